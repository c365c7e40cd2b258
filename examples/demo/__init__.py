"""A demonstration: orders with duplicates, workers killed with SIGKILL, and two ledgers beside each other.

    python -m examples.demo [--transport sql|rocketmq|rocketmq4] [--orders 5000] [--out demo-ledger.svg]

| module | what it is for |
|---|---|
| `orders` | the stream: orders, duplicates of orders, a producer's resends; and the true numbers |
| `shop` | the shop's tables, its work for one order, and the handler that exactly_once runs |
| `naive` | the same work behind the usual hand-written SELECT, then INSERT |
| `broker` | what carries the messages: a table, or a real RocketMQ started here |
| `workers` | the worker processes, and how they are killed and started again |
| `ledger` | what is in the database, and how far it is from the truth |
| `run` | the whole demonstration, from the first server to the last number |
| `picture` | the ledgers over the run, as an SVG |
"""
