"""RocketMQ 5 over gRPC, through `rocketmq-python-client`."""
