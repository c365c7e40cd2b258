"""Brokers. `contract` says what a transport is; `registry` finds a transport by the scheme of its URL."""
