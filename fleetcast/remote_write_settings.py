"""The settings of Prometheus remote-write: where it is taken and how series become metrics.

Owns: the default rules for node_exporter (grammar: docs/ingest.md). They stand apart from
`settings.py` only for their length.
"""

from dataclasses import dataclass

from fleetcast.setting import setting

# Devices whose bytes pass through another device too (or are memory) would be counted twice.
_VIRTUAL_DISKS = r"(loop|ram|zram|dm-|md|sr|fd|nbd).*"
_VIRTUAL_NICS = r"lo|(docker|br-|veth|virbr|ifb|cni|flannel|cali|tun|tap).*"

NODE_EXPORTER_RULES = (
    'cpu_pct = clamp(100 * (1 - avg(rate(node_cpu_seconds_total{mode="idle"}))), 0, 100)',
    "mem_pct = 100 * (1 - sum(node_memory_MemAvailable_bytes) / sum(node_memory_MemTotal_bytes))",
    f'disk_io_mb_s = (sum(rate(node_disk_read_bytes_total{{device!~"{_VIRTUAL_DISKS}"}}))'
    f' + sum(rate(node_disk_written_bytes_total{{device!~"{_VIRTUAL_DISKS}"}}))) / 1e6',
    f'net_in_mb_s = sum(rate(node_network_receive_bytes_total{{device!~"{_VIRTUAL_NICS}"}})) / 1e6',
    f'net_out_mb_s = sum(rate(node_network_transmit_bytes_total{{device!~"{_VIRTUAL_NICS}"}})) / 1e6',
    "load_average = max(node_load1)",
    'disk_usage_pct = 100 * (max(node_filesystem_size_bytes{mountpoint="/"})'
    ' - max(node_filesystem_free_bytes{mountpoint="/"}))'
    ' / (max(node_filesystem_size_bytes{mountpoint="/"}) - max(node_filesystem_free_bytes{mountpoint="/"})'
    ' + max(node_filesystem_avail_bytes{mountpoint="/"}))',
)


@dataclass(frozen=True)
class RemoteWriteSettings:
    """Prometheus remote-write. Lists of rules come from the TOML file: the environment splits at commas."""

    path: str = setting("/api/v1/write", "where remote-write is taken")
    server_label: str = setting("instance", "label that names the server")
    server_pattern: str = setting(
        r"(.+?)(?::\d+)?", "regular expression for that label; its first group is the server's name"
    )
    ignored_labels: tuple[str, ...] = setting(
        ("job", "prometheus", "prometheus_replica", "replica", "receive_replica"),
        "labels that do not tell two series apart, so that two scrapers of one host count once",
    )
    rules: tuple[str, ...] = setting(
        NODE_EXPORTER_RULES,
        "our metrics out of series; yours are added to these, or replace the one for the same metric",
    )
    max_unpacked_bytes: int = setting(
        16 * 2**20, "largest request, unpacked (senders make them of 0.1 to 8 MB)", low=1024
    )
    max_gap_s: float = setting(
        300.0, "longest time between two samples of a counter that still makes a rate", unit="s", low=1
    )
    max_series: int = setting(
        200_000, "most series kept in mind, about 1 KB each; further ones are refused", low=1
    )
