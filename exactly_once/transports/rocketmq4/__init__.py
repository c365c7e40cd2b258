"""RocketMQ over its remoting protocol, through `rocketmq-client-python`."""
