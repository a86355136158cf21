"""The judges of a panel together: known to answer before any is paid, and paid for whole answers."""

import asyncio
from collections.abc import Iterator

from .batch import BatchRun
from .client import Run, Stopped
from .options import Options, Unit
from .server import JudgeError, unusable
from .store import Store

Group = list[tuple[Run, int]]
Prepared = list[tuple[str, str, int] | None]


class Panel:
    """The runs of all judges, of one or more: whatever all of them have to say of one answer is a *group*, asked as one."""

    def __init__(self, runs: list[Run]):
        self.runs = runs
        self.options = runs[0].options
        by_sample: dict[int, Group] = {}
        for run in runs:
            for index, unit in enumerate(run.units):
                by_sample.setdefault(unit.sample, []).append((run, index))
        self.groups = list(by_sample.values())
        self.slots = asyncio.Semaphore(self.options.concurrency)
        # Whether all judges were looked at; a single one shows with its first request, which goes out alone.
        self.checked = len(runs) == 1
        # Groups that are paid for now, whose rest may come back into the budget, and whether one was beyond it.
        self.under_way = 0
        self.changed = asyncio.Condition()
        self.full = False

    async def run(self) -> None:
        """Fill the runs' `results`; where they cannot go on, raise JudgeError as soon as what is under way is stored."""
        try:
            if isinstance(self.runs[0], BatchRun) and any(len(group) > 1 for group in self.groups):
                for group in self.groups:
                    await self.admit(group, await self.prepare(group))
            for run in self.runs:
                if run.error is None:
                    await run.prepare()
            task = asyncio.ensure_future(self.work())
            try:
                await asyncio.wait([task])  # unlike awaiting it, this leaves it alone when it is cancelled itself
            except asyncio.CancelledError:  # Ctrl-C: what is under way is paid for
                for run in self.runs:
                    run.stop = "interrupted"
                await asyncio.wait([task], timeout=self.options.timeout)
                raise
            task.result()
        finally:
            for run in self.runs:
                if "client" in run.__dict__:
                    await run.client.close()
        if self.runs[0].error is not None:
            raise self.runs[0].error

    async def work(self) -> None:
        groups = iter(self.groups)
        if len(self.runs) > 1:  # what no server says for nothing, the first answer shows
            for group in groups:
                await self.group(group)
                if any(run.n_requests for run in self.runs):
                    break

        async def worker(groups: Iterator[Group]) -> None:
            for group in groups:
                await self.group(group)

        await asyncio.gather(*(worker(groups) for _ in range(self.options.concurrency)))

    async def group(self, group: Group) -> None:
        """Finish all units of an answer; where a judge is new, its first unit goes before the next judge's."""
        prepared: Prepared = [None] * len(group)
        granted: list[tuple[Run, str]] = []
        if not isinstance(self.runs[0], BatchRun) and (not self.checked or self.options.max_cost is not None):
            prepared = await self.prepare(group)
            granted = await self.admit(group, prepared)
        units = [(run, index, ready) for (run, index), ready in zip(group, prepared, strict=True)]
        if len(self.runs) > 1:
            for run in self.runs:
                for unit in [unit for unit in units if unit[0] is run]:
                    if run.proven or run.stop:
                        break
                    await self.one(*unit)
                    units.remove(unit)
        await asyncio.gather(*(self.one(*unit) for unit in units))
        if granted:
            for run, key in granted:
                run.reserved -= run.granted.pop(key, 0.0)
            async with self.changed:
                self.under_way -= 1
                self.changed.notify_all()

    async def one(self, run: Run, index: int, prepared: tuple[str, str, int] | None) -> None:
        async with self.slots:
            try:
                try:
                    run.refuse_if_stopped()
                    await run.one(index, prepared)
                except Stopped as error:
                    run.finish(index, reason=str(error))
            except Exception as error:  # the hook's, the disk's
                run.fail(error)

    async def prepare(self, group: Group) -> Prepared:
        """Prepare an answer's units; None is one that cannot be sent, which `Run.one` tells."""
        tasks = (asyncio.to_thread(run.options.prepare, run.units[index]) for run, index in group)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        return [None if isinstance(one, BaseException) else one for one in found]

    async def admit(self, group: Group, prepared: Prepared) -> list[tuple[Run, str]]:
        """Take what a group still costs off the budget, and return for which keys: all of it or, beyond the budget, nothing."""
        lacking: dict[tuple[Run, str], float] = {}
        for (run, _), ready in zip(group, prepared, strict=True):
            if ready is None:
                continue
            key, _, tokens = ready
            rows = run.store.answers(key)
            known = key in run.asked or key in run.granted or key in run.pending or run.options.settled(rows)
            if not known and not run.options.too_long(tokens):
                lacking[run, key] = run.most(tokens, run.options.limit([] if run.options.is_final(rows) else rows))
        if not lacking:
            return []
        if not self.checked:
            self.checked = True
            await self.check()
        async with self.changed:
            while not self.full and not self.runs[0].fits(sum(lacking.values())):
                if not self.under_way:
                    self.full = True
                    break
                await self.changed.wait()
            if self.full:
                for run, key in lacking:
                    run.refused.add(key)
                return []
            if not isinstance(self.runs[0], BatchRun):
                self.under_way += 1
            for (run, key), cost in lacking.items():
                run.granted[key] = cost
                run.reserved += cost
        return list(lacking)

    async def check(self) -> None:
        """Stop all judges where one is known not to answer, and has something left to answer."""
        for run in self.runs:
            try:
                why = await unusable(run.client, run.options)
            except JudgeError as error:
                why = str(error)
            if why and not all(is_answered(unit, run.options, run.store) for unit in run.units):
                run.fail(JudgeError(why))


def is_answered(unit: Unit, options: Options, store: Store) -> bool:
    """Return whether nothing has to be asked about a unit: its answer is stored, or its image cannot be read."""
    try:
        key, *_ = options.prepare(unit)
    except Exception:  # told when the run comes to it
        return True
    return options.settled(store.answers(key))
