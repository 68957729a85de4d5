"""The gateway: one OpenAI-compatible address in front of one or more embedding engines.

http_server  ->  app  ->  request (parse), tasks (instruction, dims), tokens (length, EOS, foreign ids)
                  |->  cache (+ disk)   answered at once
                  |->  batcher  ->  upstream pool  ->  http_client  ->  engines
config, service, workers, admin: how it is started, run, watched and changed while it runs
"""
