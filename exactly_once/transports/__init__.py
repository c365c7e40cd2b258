"""Brokers. `contract` says what a transport can do; `registry` finds one by the scheme of a URL."""
