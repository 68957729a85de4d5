"""Units for systemd: what they say (`spec`), where they lie (`places`), and putting them there (`installer`)."""

from __future__ import annotations
