"""Counts of `granulon serve`, in the text format that Prometheus reads."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import PlainTextResponse

# Upper bounds of a request's seconds.
BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What a server did and does. Each number is written by one thread alone."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.refused = 0
        self.in_flight = 0
        self.queued = 0
        self.seconds = [0] * (len(BUCKETS) + 1)
        self.seconds_sum = 0.0
        self.tokens = 0
        self.batches = 0

    def observe(self, status: int, seconds: float) -> None:
        """Count a request that ended; how long it took, if it was answered."""
        self.statuses[status] += 1
        if status < 400:
            self.seconds[bisect_left(BUCKETS, seconds)] += 1
            self.seconds_sum += seconds

    def lines(self) -> Iterator[str]:
        """Write the numbers in Prometheus' text format."""
        kinds = {
            "requests_refused_total": (
                "counter",
                "Requests that were told to come back because the server was full.",
                self.refused,
            ),
            "requests_in_flight": ("gauge", "Requests that run or wait.", self.in_flight),
            "requests_queued": ("gauge", "Requests that wait for the model.", self.queued),
            "generated_tokens_total": ("counter", "Tokens of answers.", self.tokens),
            "batches_total": ("counter", "Calls of generate, each for one or more requests.", self.batches),
        }
        for name, (kind, help, value) in kinds.items():
            yield from (f"# HELP granulon_{name} {help}", f"# TYPE granulon_{name} {kind}", f"granulon_{name} {value}")
        yield "# HELP granulon_requests_total Requests by HTTP status; 499 where the client went away."
        yield "# TYPE granulon_requests_total counter"
        for status, count in sorted(self.statuses.items()):
            yield f'granulon_requests_total{{status="{status}"}} {count}'
        yield "# HELP granulon_request_seconds Time from a request's first byte to its answer's last one."
        yield "# TYPE granulon_request_seconds histogram"
        for i, edge in enumerate((*BUCKETS, "+Inf"), 1):
            yield f'granulon_request_seconds_bucket{{le="{edge}"}} {sum(self.seconds[:i])}'
        yield f"granulon_request_seconds_sum {self.seconds_sum}"
        yield f"granulon_request_seconds_count {sum(self.seconds)}"

    async def respond(self, _: Request) -> PlainTextResponse:
        """Answer `GET /metrics`."""
        return PlainTextResponse("\n".join(self.lines()) + "\n", media_type="text/plain; version=0.0.4")
