"""One file per architecture; each keeps the contract of `zoo.mixers.base`."""
