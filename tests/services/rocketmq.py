"""Starts a real RocketMQ 5: a name server, and the proxy with the broker in one JVM, on loopback ports of its own.

It never uses a server somebody else started. Called by tests, the demo and benchmarks. The jars come from Maven
Central, once, into `.servers/rocketmq`, or from the folder that EXACTLY_ONCE_TEST_ROCKETMQ_LIB names.

A stop is a SIGKILL: an orderly one takes the broker 11 to 19 s, and its store recovers from a kill by itself.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from exactly_once.testing.child import Child, ServerFailed, free_ports, wait_until
from tests.services.rocketmq_admin import Admin, Kind

__all__ = ["RocketMQ", "fetch_jars", "fetched", "missing"]

ROOT = Path(__file__).parents[2]
POM = Path(__file__).with_name("pom.xml")
MAVEN_DEPENDENCY_PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1"
BROKER_NAME = "broker-a"  # every broker also registers a topic of its own name
NAME_SERVER_READY = "The Name Server boot success"
PROXY_READY = "rocketmq-proxy startup successfully"
START_PATIENCE_S = 240  # 5 to 10 on a quiet machine

# the broker's own guess at free memory and store sizes is made for whole machines; these fit a test
SMALL_STORE = {
    "mappedFileSizeCommitLog": 64 << 20,
    "mappedFileSizeConsumeQueue": 600_000,
    "mappedFileSizeTimerLog": 10 << 20,
    "maxHashSlotNum": 50_000,
    "maxIndexNum": 200_000,
}
BROKER_DEFAULTS = {
    "flushDiskType": "ASYNC_FLUSH",  # survives a killed process, though not a machine that loses power
    "autoCreateTopicEnable": False,  # as production has it: a misspelt topic is an error
    "autoCreateSubscriptionGroup": True,
    "enablePropertyFilter": True,  # SQL92 filters
    "waitTimeMillsInSendQueue": 5000,  # the default 200 refuses sends whenever a busy test machine stalls
    # retries (levels 3 and up) take seconds instead of two hours; the first two are what they are by default
    "messageDelayLevel": " ".join(["1s", "5s", *["1s"] * 16]),
    "transactionCheckInterval": 2000,
    "transactionTimeOut": 2000,
    "transactionOpBatchInterval": 200,  # without it finished transactions are asked about again and again
}
PROXY_DEFAULTS = {
    "grpcShutdownTimeSeconds": 3,
    "topicRouteServiceCacheRefreshSeconds": 1,
    "minInvisibleTimeMillsForRecv": 1000,
    "grpcClientConsumerMinLongPollingTimeoutMillis": 100,  # default 5000: shorter waits are refused with 40018
}
# netty and the mapped store reach into the JDK
OPENS = [
    "--add-exports=java.base/sun.nio.ch=ALL-UNNAMED",
    "--add-opens=java.base/java.nio=ALL-UNNAMED",
    "--add-opens=java.base/jdk.internal.ref=ALL-UNNAMED",
    "--add-opens=java.base/java.util=ALL-UNNAMED",
    "--add-opens=java.base/java.lang=ALL-UNNAMED",
]
LOGBACK = """<configuration>
  <appender name="F" class="ch.qos.logback.core.FileAppender">
    <file>{file}</file><encoder><pattern>%d %p %c{{1}} - %m%n</pattern></encoder>
  </appender>
  <root level="ERROR"><appender-ref ref="F"/></root>
</configuration>
"""


def jars() -> Path:
    """Return the folder the server's jars are in, or belong in."""
    return Path(os.environ.get("EXACTLY_ONCE_TEST_ROCKETMQ_LIB") or ROOT / ".servers" / "rocketmq")


def missing() -> str | None:
    """Say why RocketMQ cannot run here, or return None."""
    if shutil.which("java") is None:
        return "RocketMQ needs Java 17 or newer, and there is no `java` here (apt-get install default-jre-headless)"
    if not list(jars().glob("rocketmq-proxy-*.jar")) and shutil.which("mvn") is None:
        return f"RocketMQ's jars are not in {jars()}, and there is no `mvn` to fetch them (apt-get install maven)"
    return None


def fetch_jars() -> Path:
    """Bring the server's jars from Maven Central unless they are here, and return their folder."""
    return fetched(POM, jars(), "rocketmq-proxy-*.jar")


def fetched(pom: Path, lib: Path, sign: str) -> Path:
    """Bring the jars that a pom.xml names from Maven Central unless they are here, and return their folder.

    Args:
        pom: What to bring.
        lib: Where to.
        sign: Matches a jar that is there when all are.
    """
    lib.parent.mkdir(parents=True, exist_ok=True)
    with (lib.parent / f"{lib.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if list(lib.glob(sign)):
            return lib
        # to the side, then renamed: a Maven that was interrupted must not leave half a server behind
        aside = lib.with_suffix(".new")
        shutil.rmtree(aside, ignore_errors=True)
        maven = subprocess.run(
            [
                *("mvn", "-B", "-q", "-f", str(pom), f"{MAVEN_DEPENDENCY_PLUGIN}:copy-dependencies"),
                *("-DincludeScope=runtime", f"-DoutputDirectory={aside}"),
            ],
            capture_output=True,
            text=True,
        )
        if maven.returncode != 0:
            raise ServerFailed(f"Maven could not fetch the jars of {pom}:\n{(maven.stdout + maven.stderr)[-2000:]}")
        shutil.rmtree(lib, ignore_errors=True)
        aside.rename(lib)
    return lib


class RocketMQ:
    """A RocketMQ of one name server, one broker and one proxy.

    Args:
        directory: Where configuration, store and logs go; kept over restarts. None: a temporary one, deleted at `stop`.
        broker: Settings of broker.conf on top of ours.
        proxy: Settings of rmq-proxy.json on top of ours.
        heap_mb: The heap of the JVM that holds broker and proxy.

    Example:
        with RocketMQ() as server:
            server.create_topic("orders")
            server.create_group("inventory")
            eo.run(f"rocketmq://{server.grpc}")
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        broker: dict[str, Any] | None = None,
        proxy: dict[str, Any] | None = None,
        heap_mb: int = 512,
    ) -> None:
        self._temporary = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="exactly-once-rocketmq-"))
        # a broker also listens two ports below its own (the "VIP" channel) and one above (high availability)
        (self.broker_port,) = free_ports(around=(-2, 0, 1))
        self.name_server_port, self.grpc_port, self.remoting_port = free_ports(3)
        self.name_server = f"127.0.0.1:{self.name_server_port}"
        self.grpc = f"127.0.0.1:{self.grpc_port}"
        self.broker = f"127.0.0.1:{self.broker_port}"
        self._broker_settings = {**SMALL_STORE, **BROKER_DEFAULTS, **(broker or {})}
        self._proxy_settings = {**PROXY_DEFAULTS, **(proxy or {})}
        self._heap_mb = heap_mb
        self._name_server_child: Child | None = None
        self._proxy_child: Child | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pids(self) -> list[int]:
        """The processes that run: the name server's, and the one of proxy and broker."""
        return [child.pid for child in (self._name_server_child, self._proxy_child) if child and child.pid]

    def start(self) -> None:
        """Start what does not run, and wait until it is ready to be asked for topics."""
        lib = fetch_jars()
        self._write_configuration()
        try:
            self._start_name_server(lib)
            self._start_proxy(lib)
        except BaseException:
            self.kill()
            raise

    def start_name_server(self) -> None:
        """Start the name server alone: it knows no broker."""
        lib = fetch_jars()
        self._write_configuration()
        self._start_name_server(lib)

    def stop(self) -> None:
        """End both processes; a temporary directory is deleted."""
        self.kill()
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL both processes."""
        self.kill_proxy()
        if self._name_server_child:
            self._name_server_child.end(signal.SIGKILL)

    def kill_proxy(self) -> None:
        """SIGKILL proxy and broker (one process); the name server stays. `start` brings them back."""
        if self._proxy_child:
            self._proxy_child.end(signal.SIGKILL)

    def restart(self) -> None:
        """SIGKILL both processes and start them on the same ports and store."""
        self.kill()
        self.start()

    def admin(self) -> Admin:
        """Return a connection to the broker for administration; close it."""
        return Admin(self.broker)

    def create_topic(self, name: str, kind: Kind = "NORMAL", queues: int = 4) -> None:
        """Create a topic, and wait until the name server answers its route: a client that asks earlier fails."""
        with self.admin() as broker:
            broker.create_topic(name, kind, queues=queues)
        self.wait_for_route(name)

    def create_group(self, name: str, orderly: bool = False, retries: int = 16, **config: Any) -> None:
        """Create a consumer group; `orderly` is what FIFO needs, `retries` r gives r + 1 deliveries."""
        with self.admin() as broker:
            broker.create_group(name, orderly=orderly, retries=retries, **config)

    def wait_for_route(self, topic: str) -> None:
        """Wait until the name server can say where the topic is."""
        with Admin(self.name_server) as names:
            wait_until(lambda: names.has_route(topic), what=f"the name server knows topic {topic}", patience_s=30)

    def _start_name_server(self, lib: Path) -> None:
        if self._name_server_child is None:
            self._name_server_child = self._jvm(
                "RocketMQ name server",
                ["-Xms64m", "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"],
                lib,
                "namesrv",
                ["org.apache.rocketmq.namesrv.NamesrvStartup", "-c", str(self._conf / "namesrv.conf")],
            )
        if not self._name_server_child.running:
            self._name_server_child.start()
            self._ready(self._name_server_child, NAME_SERVER_READY)

    def _start_proxy(self, lib: Path) -> None:
        if self._proxy_child is None:
            self._proxy_child = self._jvm(
                "RocketMQ proxy and broker",
                [f"-Xms{self._heap_mb}m", f"-Xmx{self._heap_mb}m", "-XX:MaxDirectMemorySize=512m"],
                lib,
                "proxy",
                [
                    *("org.apache.rocketmq.proxy.ProxyStartup", "-pm", "local", "-n", self.name_server),
                    *("-bc", str(self._conf / "broker.conf"), "-pc", str(self._conf / "rmq-proxy.json")),
                ],
            )
        if not self._proxy_child.running:
            self._proxy_child.start()
            self._ready(self._proxy_child, PROXY_READY)
            # after a restart the name server answers with nothing, or the past, until the broker has registered
            with Admin(self.name_server) as names:
                wait_until(lambda: names.has_route(BROKER_NAME), what="the broker has registered", patience_s=30)

    def _jvm(self, name: str, options: list[str], lib: Path, log: str, main: list[str]) -> Child:
        java = ["java", *options, *OPENS, f"-Duser.home={self.directory}"]
        java.append(f"-Drmq.logback.configurationFile={self._conf / f'rmq.{log}.logback.xml'}")
        return Child(
            name,
            [*java, "-cp", f"{self._conf}:{lib}/*", *main],
            output=self.directory / f"{log}.out",
            environ={"ROCKETMQ_HOME": str(self.directory)},
        )

    @staticmethod
    def _ready(child: Child, line: str) -> None:
        child.wait_until(lambda: line in child.printed(), what=f"saying {line!r}", patience_s=START_PATIENCE_S)

    @property
    def _conf(self) -> Path:
        return self.directory / "conf"

    def _write_configuration(self) -> None:
        self._conf.mkdir(parents=True, exist_ok=True)
        for log in ("namesrv", "proxy", "broker", "tools", "client"):
            file = self.directory / "logs" / f"{log}.log"
            (self._conf / f"rmq.{log}.logback.xml").write_text(LOGBACK.format(file=file))
        _properties(
            self._conf / "namesrv.conf",
            {"listenPort": self.name_server_port, "bindAddress": "127.0.0.1"},
        )
        store = self.directory / "store"
        _properties(
            self._conf / "broker.conf",
            {
                "brokerClusterName": "DefaultCluster",
                "brokerName": BROKER_NAME,
                "brokerId": 0,
                "brokerIP1": "127.0.0.1",
                "brokerIP2": "127.0.0.1",
                "bindAddress": "127.0.0.1",
                "listenPort": self.broker_port,
                "haListenPort": self.broker_port + 1,
                "namesrvAddr": self.name_server,
                "storePathRootDir": store,
                "storePathCommitLog": store / "commitlog",
                **self._broker_settings,
            },
        )
        proxy = {
            "rocketMQClusterName": "DefaultCluster",
            "namesrvAddr": self.name_server,
            "localServeAddr": "127.0.0.1",
            "grpcServerPort": self.grpc_port,
            "remotingListenPort": self.remoting_port,
            **self._proxy_settings,
        }
        (self._conf / "rmq-proxy.json").write_text(json.dumps(proxy, indent=1))


def _properties(file: Path, settings: dict[str, Any]) -> None:
    lines = (f"{k}={str(v).lower() if isinstance(v, bool) else v}\n" for k, v in settings.items())
    file.write_text("".join(lines))
