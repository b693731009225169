"""Recurrence and attention primitives: definition, parallel form, choice of kernel, one file each.

Every op returns `(y, state)` for `(b, t, ...)` sequences; `state=None` means empty. Gradients flow
to every tensor argument, the incoming state included, and from the outgoing state. `backend` is
`auto` (the best there is, logged once), or the name of one, which raises where it is missing.
"""
