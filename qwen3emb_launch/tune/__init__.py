"""`tune`: which launch settings serve a load best, within an objective and a time budget.

space     the settings worth trying, derived from a plan, each with its reason    levels   the most load that holds
trials    what was tried and what came of it                                      strategy what to try next
objective what better means                                                       contest  who wins the final
journal   every result on disk as it comes                                        final    holding it, in turns
machine   what a run is given                                                     budget   what is left of the time
report    the outcome: verdict, Pareto front, rows                                runner   all of it
winner    the profile it ends with

Starting, proving and measuring an engine is done by the callables that the shell hands in.
"""

from __future__ import annotations
