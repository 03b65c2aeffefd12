"""Runs one command on every host of Cloud TPU slices, and sees it to its end through preemptions.

  python -m tpu.launch up --pod=tpu/pod.toml --dry-run    every gcloud call it would make, in order; none is made
  python -m tpu.launch up --pod=tpu/pod.toml              create, install, run, watch to the end, delete

Or a step at a time: create, install, run, watch, logs, status, stop, fetch, delete. Needs `gcloud`, signed in, and
Python alone; tpu/README.md starts from zero. The run must keep its state in the workdir, go on from it when the same
command is given again, and exit with 75 where SIGTERM made it save and stop. `pe_jax.train` does.
"""

import argparse
import collections
import dataclasses
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TO_BE_CONTINUED = "75"  # the run's own exit code where it saved and waits to be started again
# The VM image of each kind of chip, and the chips that the number in an accelerator's name stands for.
KINDS = {
    "v4": ("tpu-ubuntu2204-base", 0.5),
    "v5litepod": ("v2-alpha-tpuv5-lite", 1.0),
    "v5p": ("v2-alpha-tpuv5", 0.5),
    "v6e": ("v2-alpha-tpuv6e", 1.0),
}
PROVISIONING = {"spot": ["--spot"], "reserved": ["--reserved"], "on-demand": []}
# States of a queued resource, in Cloud TPU's words but for the first two.
UNKNOWN, NONE, ACTIVE = "UNKNOWN", "NONE", "ACTIVE"
LOST = ("SUSPENDED", "FAILED")  # it holds nothing any more, counts against the quota, and must be deleted
PATIENCE = 3  # looks in a row that a host may leave unanswered before its slices are given up
ATTEMPTS = 5  # failures in a row of what starts the run, or deletes it

# ---- what a host is told, in its own shell ----

FOLDER = "pe_jax_run"  # in the home of every host: the checkout, `installed`, `pid`, `log`, and at the end `code`
BUNDLE = "pe_jax.tar.gz"
# Whether the run is still there; its number may be another process's after a reboot.
ALIVE = "grep -qs code.new /proc/$(cat pid)/cmdline"
# An exit code, or "running", "gone" (killed before it could leave a code), "idle" (not started), "bare".
ASK = (
    f"cd {FOLDER} 2>/dev/null && [ -e installed ] || {{ echo bare; exit; }}; [ -e pid ] || {{ echo idle; exit; }}; "
    f"if {ALIVE}; then echo running; else cat code 2>/dev/null || echo gone; fi"
)
RESTARTABLE = {"gone", "idle", "bare", TO_BE_CONTINUED}
# Of each host whose run failed, the end of its log.
FAILURES = (
    f"cd {FOLDER} && [ -s code ] && [ $(cat code) != 0 ] && echo --- $(hostname), exit code $(cat code) && "
    "tail -n 20 log; true"
)


@dataclasses.dataclass(frozen=True)
class Pod:
    """One run and the slices it is for; the fields are explained in tpu/pod.toml.

    Raises:
      ValueError: if a field cannot be.
    """

    name: str
    project: str
    zone: str
    accelerator: str
    workdir: str
    command: str
    slices: int = 1
    provisioning: str = "spot"
    wait_hours: int = 24
    usd_per_chip_hour: float = 0.0
    restarts: int = 100
    runtime: str = ""
    python: str = "3.12"
    packages: tuple[str, ...] = ()
    create_flags: tuple[str, ...] = ()
    ssh_flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", self.name):
            raise ValueError(f"name = {self.name!r}: take at most 50 small letters, digits and dashes.")
        kind, _, number = self.accelerator.rpartition("-")
        if kind not in KINDS or not number.isdigit():
            raise ValueError(
                f"accelerator = {self.accelerator!r}: take {', '.join(f'{kind}-NUMBER' for kind in KINDS)}. Other "
                "chips, such as tpu7x, are had through GKE: see tpu/README.md."
            )
        if self.provisioning not in PROVISIONING:
            raise ValueError(f"provisioning = {self.provisioning!r}: take one of {', '.join(PROVISIONING)}.")
        if self.slices < 1:
            raise ValueError(f"slices = {self.slices}: take 1 or more.")
        if not re.fullmatch(r"gs://[\w.-]+/[\w./=-]*[\w.=-]", self.workdir):
            raise ValueError(
                f"workdir = {self.workdir!r}: take a folder gs://BUCKET/FOLDER; one on a host ends with the host, and "
                "the other hosts do not see it."
            )
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ValueError(f"environment has {name!r}: take the name of a variable.")
        if "{workdir}" not in self.command:
            raise ValueError(f"command = {self.command!r} has no {{workdir}}; a run that is not told it cannot go on.")
        if re.search(r"\bexec\b", self.command):
            raise ValueError(f"command = {self.command!r}: leave out exec; the shell stays, to note how the run ends.")

    @property
    def chips(self) -> int:
        kind, _, number = self.accelerator.rpartition("-")
        return int(int(number) * KINDS[kind][1]) * self.slices

    @property
    def image(self) -> str:
        return self.runtime or KINDS[self.accelerator.rpartition("-")[0]][0]

    @property
    def nodes(self) -> list[str]:
        """The names of the slices; gcloud numbers them where there are several."""
        return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

    def __str__(self) -> str:
        """What it holds and costs."""
        hour = self.chips * self.usd_per_chip_hour
        cost = f"{hour:,.0f} USD an hour, {24 * hour:,.0f} a day" if hour else "usd_per_chip_hour is not given"
        return f"{self.chips} chips ({self.slices} x {self.accelerator}, {self.provisioning}; {cost})"


def read(path: pathlib.Path) -> Pod:
    """The pod of a TOML file.

    Raises:
      ValueError: if the file is missing or wrong; the text says what to change.
    """
    if not path.is_file():
        raise ValueError(f"--pod={path}: there is no such file; copy tpu/pod.toml and fill it in.")
    fields = {field.name: field for field in dataclasses.fields(Pod)}
    needed = {name for name, field in fields.items() if field.default is field.default_factory}  # it has neither
    kinds = {
        str: (str, "a string"),
        int: (int, "an integer"),
        float: ((int, float), "a number"),
        tuple: (list, "a list of strings"),
        Mapping: (dict, "a table of strings"),
    }
    try:
        given = tomllib.loads(path.read_text())
        if unknown := sorted(given.keys() - fields):
            raise ValueError(f"{', '.join(unknown)} is not known; the keys are {', '.join(fields)}.")
        if missing := [name for name in fields if name in needed - given.keys()]:
            raise ValueError(f"{', '.join(missing)} is missing.")
        for name, hint in typing.get_type_hints(Pod).items():
            kind, told = kinds[typing.get_origin(hint) or hint]
            value = given.get(name)
            words = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
            if name in given and not (isinstance(value, kind) and all(isinstance(word, str) for word in words)):
                raise ValueError(f"{name} = {value!r}: take {told}.")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        return Pod(**values)
    except ValueError as error:  # of TOML too
        raise ValueError(f"--pod={path}: {error}") from None


class CloudError(Exception):
    """A gcloud call that failed; the text says which and what to do."""


class Cloud:
    """The gcloud calls of one pod, each shown when it is made.

    Args:
      pod: what they are for.
      dry: show them and make none; every call then answers as where all goes well.
      there: with `dry`, whether the slices are there to begin with.
      poll: seconds between two looks at the pod.
      grace: seconds that a run has to save when it is stopped.
    """

    def __init__(self, pod: Pod, *, dry: bool = False, there: bool = True, poll: float = 30.0, grace: int = 120):
        self.pod, self.dry, self.poll, self.grace = pod, dry, poll, grace
        self._where = (f"--project={pod.project}", f"--zone={pod.zone}")
        self._imagined = {"state": ACTIVE if there else NONE, "hosts": "0"}
        self._looks: set[str] = set()  # those shown already
        self._lines = 0  # of the first host's log, shown already

    # ---- the queued resource ----

    def create(self) -> None:
        """Queues for the slices.

        Raises:
          CloudError: if the project may not have so many chips, or the request is wrong.
        """
        pod = self.pod
        nodes = [f"--node-id={pod.name}"]
        if pod.slices > 1:
            nodes = [f"--node-count={pod.slices}", f"--node-prefix={pod.name}"]
        say(f"asking for {pod}; they cost from when they are there until they are deleted")
        done = self._call(
            *("compute", "tpus", "queued-resources", "create", pod.name, *self._where),
            *(f"--accelerator-type={pod.accelerator}", f"--runtime-version={pod.image}", *nodes),
            *(f"--valid-until-duration={pod.wait_hours}h", *PROVISIONING[pod.provisioning]),
            *(*pod.create_flags, "--quiet"),
            whole=True,
        )
        if done.returncode:
            raise self.refusal(_reason(done))
        self._imagined = {"state": ACTIVE, "hosts": "bare"}

    def refusal(self, reason: str) -> CloudError:
        """What to tell where Cloud TPU would not give the slices."""
        pod = self.pod
        if "quota" not in reason.lower():
            return CloudError(f"the slices were refused: {reason}")
        return CloudError(
            f"{pod.project} has no quota for {pod.slices} x {pod.accelerator} ({pod.provisioning}) in {pod.zone}: "
            f"{reason}\nAsk for that quota (Cloud TPU API, under IAM & Admin > Quotas), or change zone, accelerator or "
            "provisioning. Failed and suspended queued resources count until they are deleted; list them with\n  "
            + shlex.join(["gcloud", "compute", "tpus", "queued-resources", "list", *self._where])
        )

    def state(self) -> tuple[str, str]:
        """Of the queued resource, in Cloud TPU's own word, NONE or UNKNOWN; and the reason where one is given."""
        done = self._call(
            *("compute", "tpus", "queued-resources", "describe", self.pod.name, *self._where),
            "--format=value(state.state,state.failedData.error.message)",
            assume=self._imagined["state"],
            look=True,
        )
        if done.returncode:
            return (NONE, "") if _is_missing(done) else (UNKNOWN, _reason(done))
        state, _, reason = done.stdout.strip().partition("\t")
        return state or UNKNOWN, reason

    def delete(self) -> None:
        """Gives the slices back; it is no error if there are none.

        Raises:
          CloudError: if they may still be there, and still cost.
        """
        words = ("compute", "tpus", "queued-resources", "delete", self.pod.name, *self._where, "--force", "--quiet")
        for attempt in range(ATTEMPTS):
            if attempt:
                self.pause()
            try:
                done = self._call(*words, whole=True)
            except KeyboardInterrupt:
                say("interrupted: delete again, for the slices may still cost")
                raise
            if not done.returncode or _is_missing(done):
                self._imagined["state"] = NONE
                return
            say(f"not deleted: {_reason(done)}")
        raise CloudError(f"NOT DELETED, {self.pod} may still cost; make the call shown last until it succeeds.")

    # ---- its hosts ----

    def install(self, source: pathlib.Path) -> None:
        """Copies the last commit of the checkout `source` to every host and installs it there.

        Raises:
          CloudError: if a host refuses.
        """
        pod = self.pod
        with tempfile.TemporaryDirectory() as folder:
            bundle = pathlib.Path(BUNDLE)
            if not self.dry:
                bundle = folder / bundle
                _pack(source, bundle)
            self._held(
                self._calls(
                    [
                        *("compute", "tpus", "tpu-vm", "scp", str(bundle), f"{node}:{BUNDLE}", *self._where),
                        *("--worker=all", "--quiet", "--scp-flag=-oConnectTimeout=15", *pod.ssh_flags),
                    ]
                    for node in pod.nodes
                )
            )
        # The images' own Python is too old; uv brings one.
        uv = f'python3 -m uv pip install --quiet --python=.venv/bin/python -e ".[tpu]" {shlex.join(pod.packages)}'
        self._everywhere(
            f"rm -rf {FOLDER} && mkdir {FOLDER} && tar -xzf {BUNDLE} -C {FOLDER} && cd {FOLDER} && "
            "python3 -m pip install --quiet --user uv && "
            f"python3 -m uv venv --quiet --python={shlex.quote(pod.python)} .venv && {uv.strip()} && touch installed"
        )
        self._lines = 0
        self._imagined["hosts"] = "idle"

    def run(self) -> None:
        """Starts the command on every host, in the background; it outlives the connection.

        Raises:
          CloudError: if it could not be started on a host.
        """
        pod = self.pod
        # The log goes to the workdir: the host may be gone when someone asks for it.
        upload = f"gcloud storage cp log {pod.workdir}/logs/$(hostname).log >/dev/null 2>&1"
        body = "; ".join(
            [
                # SIGTERM goes to the whole group; this shell stays, to note how the command ends.
                "trap : TERM",
                f'trap "echo \\$? > code.new; {upload}; mv code.new code" EXIT',
                "export PATH=$PWD/.venv/bin:$PATH",
                *(f"export {name}={shlex.quote(value)}" for name, value in pod.environment.items()),
                pod.command.strip().replace("{workdir}", pod.workdir),
            ]
        )
        self._everywhere(
            f"cd {FOLDER} && rm -f code && (setsid bash -c {shlex.quote(body)} >> log 2>&1 < /dev/null & echo $! > pid)"
        )
        self._imagined["hosts"] = "0"

    def ask(self) -> list[str] | None:
        """What each host tells of its run, in the words of `ASK`; None where a host did not answer."""
        done = self._ssh(ASK, assume=self._imagined["hosts"], look=True)
        if any(each.returncode or not each.stdout.strip() for each in done):
            return None
        return [word for each in done for word in each.stdout.split()]

    def new_lines(self) -> str:
        """Those of the first host's log since the last time."""
        [done] = self._ssh(f"tail -n +{self._lines + 1} {FOLDER}/log", self.pod.nodes[:1], worker="0", look=True)
        whole, newline, _ = done.stdout.rpartition("\n")
        self._lines += done.stdout.count("\n")
        return whole + newline

    def failures(self) -> str:
        """The ends of the logs of those hosts whose run failed."""
        return "".join(done.stdout for done in self._ssh(FAILURES))

    def stop(self) -> None:
        """Tells the run to save and end, and kills what is left of it; a host that does not answer is passed over."""
        self._ssh(
            f"cd {FOLDER} && kill -TERM -- -$(cat pid) && for i in $(seq {2 * self.grace}); do {ALIVE} || break; "
            "sleep .5; done; kill -KILL -- -$(cat pid); true"
        )

    def logs(self) -> int:
        """Shows the first host's log, and goes on to show it. → gcloud's exit code."""
        tail = f"tail -n 100 -F {FOLDER}/log"
        return self._ssh(tail, self.pod.nodes[:1], worker="0", show=True)[0].returncode

    def fetch(self, target: pathlib.Path, exclude: str = "") -> None:
        """Copies the workdir to a folder here; what is there already and equal is not copied again.

        Args:
          target: is made if it is not there.
          exclude: a regular expression of paths in the workdir that are left out.

        Raises:
          CloudError: if it cannot be read.
        """
        if not self.dry:
            target.mkdir(parents=True, exist_ok=True)
        left_out = [f"--exclude={exclude}"] if exclude else []
        done = self._call("storage", "rsync", "--recursive", *left_out, self.pod.workdir, str(target), show=True)
        if done.returncode:
            raise CloudError(f"{self.pod.workdir} was not fetched, for the reason shown above.")

    # ---- calls ----

    def pause(self, times: int = 1) -> None:
        if not self.dry:
            time.sleep(times * self.poll)

    def _everywhere(self, command: str) -> None:
        self._held(self._ssh(command))

    def _held(self, calls: Sequence[subprocess.CompletedProcess[str]]) -> None:
        for node, done in zip(self.pod.nodes, calls, strict=True):
            if done.returncode:
                told = "\n  ".join(done.stderr.strip().splitlines()[-12:])
                raise CloudError(f"a host of {node} refused; the last it said is\n  {told}")

    def _ssh(
        self, command: str, nodes: Sequence[str] = (), *, worker: str = "all", **more: Any
    ) -> list[subprocess.CompletedProcess[str]]:
        """`command` on the hosts of some slices, or of all, at the same time."""
        return self._calls(
            (
                [
                    *("compute", "tpus", "tpu-vm", "ssh", node, *self._where, f"--worker={worker}", "--quiet"),
                    # gcloud tries ten times; without a limit each would wait for minutes on a host that is gone.
                    *("--ssh-flag=-oConnectTimeout=15", "--ssh-flag=-oServerAliveInterval=15"),
                    *(*self.pod.ssh_flags, f"--command={command}"),
                ]
                for node in nodes or self.pod.nodes
            ),
            **more,
        )

    def _call(self, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return self._calls([words], **more)[0]

    def _calls(
        self,
        calls: Iterable[Sequence[str]],
        *,
        assume: str = "",
        look: bool = False,
        whole: bool = False,
        show: bool = False,
    ) -> list[subprocess.CompletedProcess[str]]:
        """Makes some calls at the same time.

        Args:
          calls: the words of each after `gcloud`.
          assume: what each answers in a dry run.
          look: it changes nothing; it is shown the first time only.
          whole: it is not broken off by Ctrl-C, which would leave open whether the slices are there.
          show: its output goes to the terminal.
        """
        lines = [["gcloud", *words] for words in calls]
        for words in lines:
            kind = shlex.join(words[:-1])  # the last says which lines of the log
            if self.dry or not look or kind not in self._looks:
                say(f"+ {shlex.join(words)}")
            self._looks.add(kind)
        if self.dry:
            missing = assume == NONE
            told = "NOT_FOUND" if missing else ""
            return [subprocess.CompletedProcess(words, int(missing), assume, told) for words in lines]
        pipe = None if show else subprocess.PIPE
        try:
            running = [
                subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=whole)
                for words in lines
            ]
        except FileNotFoundError:
            raise CloudError("gcloud is not on PATH; install the Google Cloud CLI and sign in to it.") from None
        ended = []
        for process in running:
            try:
                out, err = process.communicate()
            except KeyboardInterrupt:
                for each in running:
                    if not whole:
                        each.terminate()
                    if each.poll() is None:
                        each.communicate()
                raise
            texts = [(text or b"").decode(errors="replace") for text in (out, err)]
            ended.append(subprocess.CompletedProcess(process.args, process.returncode, *texts))
        return ended


def say(text: str) -> None:
    print(text, flush=True)


def _is_missing(done: subprocess.CompletedProcess[str]) -> bool:
    return bool(re.search("NOT_FOUND|not found", done.stderr))


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The line of gcloud's that says why."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "gcloud gave no reason.")


def _pack(source: pathlib.Path, bundle: pathlib.Path) -> None:
    """The last commit as a tar file; what is not committed stays here, and is told."""
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=source, capture_output=True, text=True)
    words = ["git", "archive", "--format=tar.gz", f"--output={bundle}", "HEAD"]
    done = subprocess.run(words, cwd=source, capture_output=True, text=True)
    if done.returncode:
        raise CloudError(
            f"{source} cannot be packed; run this from a git checkout with a commit: {done.stderr.strip()}"
        )
    if files := changed.stdout.splitlines():
        say(f"not installed, for they are not committed: {len(files)} files, such as {files[0][3:]}")


def watch(cloud: Cloud, source: pathlib.Path, *, patience: int = PATIENCE) -> int:
    """Stays with a pod until its run ends: starts the run where it is not, on new slices where the old ones are lost.

    Args:
      cloud: the pod's calls.
      source: the checkout to install on new slices.
      patience: looks in a row that a host may leave unanswered before its slices are given up.

    Returns:
      0 when every host ended well; 1 when the program failed, the restarts are used up, or someone deleted the slices.

    Raises:
      CloudError: if gcloud does not work at all, the slices are refused, or the run cannot be started.
    """
    restarts = silent = failing = errors = 0
    seen: collections.Counter[str] = collections.Counter()
    last = ""
    while True:
        state, reason = cloud.state()
        if state == UNKNOWN and not seen:
            raise CloudError(f"the state of {cloud.pod.name} is not known: {reason}")
        seen[state] += 1
        if state != last:
            say(f"{state}: {reason}" if reason else state)
        last = state
        told = cloud.ask() if state == ACTIVE else []
        codes = set(told or ())
        fresh = codes in ({"bare"}, {"idle"})
        if codes and not fresh:
            print(cloud.new_lines(), end="", flush=True)
        silent = silent + 1 if told is None else 0
        lost = state in LOST or silent == patience or (state == NONE and errors > 0)
        # Seen twice, for a host that is lost is often known as such only after the others have failed for want of it.
        failing = failing + 1 if codes - {"0", "running"} and not codes & RESTARTABLE else 0

        if state == NONE and not lost:
            say("someone deleted the slices; they are not created again")
            return 1
        if codes == {"0"}:
            say(f"finished on every host; what it wrote is in {cloud.pod.workdir}")
            return 0
        if failing == 2:
            say(f"the program failed, with exit codes {', '.join(sorted(codes))}; it is not started again")
            say(cloud.failures())
            cloud.stop()  # hosts that wait for the others do so forever
            return 1
        if silent:
            say(f"a host does not answer ({silent} of {patience} looks)")
        if not lost and not codes & RESTARTABLE:
            cloud.pause()
            continue
        if state == "FAILED":
            errors += 1
            if errors == ATTEMPTS or not seen[ACTIVE]:
                raise cloud.refusal(reason)
        elif not fresh and not errors:
            if restarts == cloud.pod.restarts:
                say(f"given up after {restarts} restarts")
                return 1
            restarts += 1
            say(f"restart {restarts}, {'on new slices' if lost else 'on the same slices'}")
        try:
            if lost:
                silent = 0
                cloud.delete()
                cloud.create()
            else:
                if not fresh:
                    cloud.stop()
                if "bare" in codes:
                    cloud.install(source)
                cloud.run()
                errors = 0
        except CloudError as error:
            errors += 1
            if errors == ATTEMPTS:
                raise
            say(str(error))
        cloud.pause(2**errors)


def up(cloud: Cloud, source: pathlib.Path, *, keep: bool = False) -> int:
    """Everything, from the request to the deletion; goes on with slices that are there already. → `watch`'s code."""
    state, reason = cloud.state()
    if state == UNKNOWN:
        raise CloudError(f"the state of {cloud.pod.name} is not known: {reason}")
    try:
        if state in LOST:
            cloud.delete()
        if state in (NONE, *LOST):
            cloud.create()
        return watch(cloud, source)
    except KeyboardInterrupt:
        if not keep:
            say("interrupted: the run is told to save, then the slices are deleted")
            cloud.stop()
        raise
    finally:
        if keep:
            say(f"kept: {cloud.pod}, until deleted")
        else:
            cloud.delete()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = ("up", "create", "install", "run", "watch", "logs", "status", "stop", "fetch", "delete")
    parser.add_argument("action", choices=actions)
    parser.add_argument("--pod", required=True, metavar="FILE", type=pathlib.Path, help="a copy of tpu/pod.toml")
    parser.add_argument("--dry-run", action="store_true", help="show every gcloud call, make none")
    parser.add_argument("--poll", type=float, default=30.0, metavar="SECONDS", help="between two looks at the pod")
    parser.add_argument("--keep", action="store_true", help="up: do not delete the slices at the end; they cost on")
    parser.add_argument("--to", metavar="FOLDER", type=pathlib.Path, help="fetch: where to; default: runs/NAME")
    parser.add_argument("--exclude", default="", metavar="REGEX", help="fetch: leave out, such as 'checkpoints/.*'")
    args = parser.parse_args(argv)
    source = pathlib.Path(__file__).resolve().parents[1]
    try:
        pod = read(args.pod)
        cloud = Cloud(pod, dry=args.dry_run, there=args.action not in ("up", "create"), poll=args.poll)
        match args.action:
            case "up":
                return up(cloud, source, keep=args.keep)
            case "create":
                cloud.create()
            case "install":
                cloud.install(source)
            case "run":
                if "running" in (cloud.ask() or ()):
                    raise CloudError("a run is going on there; `stop` it first, or `watch` it.")
                cloud.run()
            case "watch":
                code = watch(cloud, source)
                say(f"`delete` gives the slices back, if they are still there; until then they cost: {pod}")
                return code
            case "logs":
                return cloud.logs()
            case "status":
                state, reason = cloud.state()
                say(f"{pod.name}: {state} {reason}".strip())
                if state == ACTIVE:
                    told = collections.Counter(cloud.ask() or ["not all answer"])
                    say(f"held: {pod}\nhosts: {', '.join(f'{count} x {word}' for word, count in told.items())}")
            case "stop":
                cloud.stop()
            case "fetch":
                cloud.fetch(args.to or pathlib.Path("runs") / pod.name, args.exclude)
            case "delete":
                cloud.delete()
    except (CloudError, ValueError) as error:
        if isinstance(error.__context__, CloudError):  # why `up` ended, before the deletion failed too
            print(f"tpu.launch: {error.__context__}", file=sys.stderr)
        print(f"tpu.launch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if args.action != "up":
            print("tpu.launch: the slices are as they were; `delete` gives them back", file=sys.stderr)
        return 130
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
