"""The launcher against a stand-in for `gcloud`, whose hosts are folders in which their commands are really run."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from pe_jax import train
from tpu import launch
from tpu.launch import Cloud, CloudError, Pod

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the hosts are Linux: setsid, /proc")

# A cloud in a folder, whose slices have two hosts. state.json tells what it will do; a file in events/ named EVENT@MARK
# happens once every host has written HOST-MARK into the workdir.
GCLOUD = r"""#!PYTHON -IS
import json, os, pathlib, shutil, signal, subprocess, sys, time

world = pathlib.Path(os.environ["WORLD"])
words = sys.argv[1:]
plain = [word for word in words if not word.startswith("--")]
flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
before = (world / "state.json").read_text()
state = json.loads(before)


def leave(told="", code=1):
    if json.dumps(state) != before:  # calls are made at the same time, and hosts make some too
        (world / "state.new").write_text(json.dumps(state))
        (world / "state.new").replace(world / "state.json")
    print(told, file=sys.stderr)
    sys.exit(code)


def local(address):
    return world / "bucket" / address[5:] if address.startswith("gs://") else pathlib.Path(address)


def homes(pattern="*"):
    return sorted((world / "hosts").glob(pattern))


def kill(home):
    try:
        os.killpg(int((home / "pe_jax_run/pid").read_text()), signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        pass


def remove(home):
    kill(home)
    shutil.rmtree(home)


if plain[0] == "storage":  # hosts call it too
    source, target = map(local, plain[2:])
    if not source.exists():
        leave(f"ERROR: (gcloud.storage.{plain[1]}) {source.name} matched no objects")
    if plain[1] == "cp":
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    else:
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(flags.get("exclude", "")))
    sys.exit()

with open(world / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(words) + "\n")
for event in sorted((world / "events").iterdir()):
    name, _, mark = event.name.partition("@")
    if not homes() or not all((world / "bucket/b/w" / f"{home.name}-{mark}").exists() for home in homes()):
        continue
    event.unlink()
    if name == "preempt":
        state["looks"] = ["SUSPENDING", "SUSPENDED"]
        for home in homes():
            remove(home)
    elif name == "delete":
        state["looks"] = []
        for home in homes():
            remove(home)
    elif name == "kill":
        for home in homes():
            kill(home)
    elif name == "die":
        kill(homes()[-1])
        state["dead"] = True
    elif name == "replace":  # as the repair of a slice does
        remove(homes()[-1])
        (world / "hosts" / (state["nodes"][-1] + "-1")).mkdir()
    elif name == "offline":
        state["offline"] = 3

group, verb = plain[2:4]
missing = f"ERROR: (gcloud.compute.tpus.{group}.{verb}) NOT_FOUND: Resource was not found"
if verb == "create":
    if state["slow"]:
        (world / "asked").touch()
        time.sleep(state["slow"])
    if state["refusals"]:
        leave(state["refusals"].pop(0))
    if state["looks"]:
        leave("ERROR: ALREADY_EXISTS: Resource already exists")
    state["looks"] = state["plans"].pop(0) if state["plans"] else ["ACTIVE"]
    many = range(int(flags.get("node-count", 0)))
    state |= {"dead": False, "nodes": [f"{flags['node-prefix']}-{i}" for i in many] or [flags["node-id"]]}
    for node in state["nodes"]:
        for worker in range(2):
            (world / "hosts" / f"{node}-{worker}").mkdir(parents=True)
elif verb == "describe":
    if state["offline"]:
        state["offline"] -= 1
        leave("ERROR: (gcloud) There was a problem reaching the service")
    if not state["looks"]:
        leave(missing)
    print(state["looks"][0])
    state["looks"] = state["looks"][1:] or state["looks"]
elif verb == "delete":
    if state["stuck"]:
        state["stuck"] -= 1
        leave("ERROR: (gcloud.compute.tpus.queued-resources.delete) UNAVAILABLE: try again later")
    if not state["looks"]:
        leave(missing)
    state["looks"] = []
    for home in homes():
        remove(home)
else:
    node = plain[4] if verb == "ssh" else plain[5].partition(":")[0]
    worst = 0
    for home in homes(f"{node}-{'?' if flags['worker'] == 'all' else flags['worker']}") or [None]:
        if home is None or (state["dead"] and home == homes()[-1]):
            print("ssh: connect to host port 22: Connection timed out", file=sys.stderr)
            worst = 255
        elif verb == "scp":
            shutil.copy(plain[4], home / plain[5].partition(":")[2])
        else:
            own = {"HOME": str(home), "HOST": home.name, "WORLD": str(world), "PATH": f"{world}/host:/usr/bin:/bin"}
            code = subprocess.run(["bash", "-c", flags["command"]], cwd=home, env=own).returncode
            worst = code or worst
    leave(f"##### Command execution failed with exit status {worst}" if worst else "", worst)
leave(code=0)
"""

# What hosts have of Python and of a name: enough for `install`, without a network.
PYTHON3 = """#!/bin/bash
case "$*" in
  "-m pip install --quiet --user uv") ;;
  "-m uv venv --quiet --python=3.12 .venv") mkdir -p .venv/bin && ln -s PYTHON .venv/bin/python ;;
  "-m uv pip install --quiet --python=.venv/bin/python -e .[tpu] jax==0.10.2") [ -e program.py -o -e pyproject.toml ] ;;
  *) echo "error: no such thing as $*" >&2; exit 1 ;;
esac
"""

# A run of six steps, which are kept in the workdir. "3=wait" has it wait at the third for what may come; "3=2" has it
# end there with code 2; each happens once.
PROGRAM = """
import os, pathlib, signal, sys, time

workdir = pathlib.Path(os.environ["WORLD"], "bucket", sys.argv[1][5:])
workdir.mkdir(parents=True, exist_ok=True)
host = os.environ["HOST"]


def save(*_):
    time.sleep(0.5)  # as a real one takes its time
    (workdir / f"{host}-saved").touch()
    sys.exit(75)


signal.signal(signal.SIGTERM, save)
done = workdir / f"{host}-steps"
plans = dict(word.removeprefix(host + ":").split("=") for word in sys.argv[2:] if ":" not in word or host in word)
for step in range(int(done.read_text()) if done.exists() else 0, 6):
    print("step", step + 1, flush=True)
    done.write_text(str(step + 1))
    mark = workdir / f"{host}-at-{step + 1}"
    if str(step + 1) in plans and not mark.exists():
        mark.touch()
        if plans[str(step + 1)] == "wait":
            time.sleep(60)
        sys.exit(int(plans[str(step + 1)]))
"""


class World:
    """The stand-in's folder, and what tests ask of it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        scripts = {
            "bin/gcloud": GCLOUD,
            "host/gcloud": GCLOUD,
            "host/python3": PYTHON3,
            "host/hostname": "#!/bin/bash\necho $HOST",
        }
        for path, text in scripts.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text.replace("PYTHON", sys.executable))
            (folder / path).chmod(0o755)
        (folder / "events").mkdir()
        self.set()

    def set(self, **changes):
        """`plans`: of each request, the states that looks find, the last of them forever; ACTIVE without a plan."""
        lists = {"looks": [], "nodes": [], "plans": [], "refusals": []}
        state = lists | {"dead": False, "offline": 0, "stuck": 0, "slow": 0}
        (self.folder / "state.json").write_text(json.dumps(state | changes))

    def on(self, mark: str, event: str):
        (self.folder / "events" / f"{event}@{mark}").touch()

    def words(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def calls(self) -> list[str]:
        """What was called, in order; "look" stands for any number of looks."""
        commands = {
            "touch installed": "install", "setsid": "run", "echo bare": "look", "tail -n +": "look",
            "kill -TERM": "stop", "hostname": "failures",
        }  # fmt: skip
        names = []
        for words in self.words():
            name = "look" if words[3] == "describe" else words[3]
            if name == "ssh":
                name = next(commands[part] for part in commands if part in words[-1])
            if name != "look" or names[-1:] != ["look"]:
                names.append(name)
        return names

    def wrote(self, name: str) -> str:
        return (self.folder / "bucket/b/w" / name).read_text()

    def alive(self) -> list[int]:
        """The processes of hosts."""
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"HOME={self.folder}/hosts" in path.read_bytes().decode(errors="replace"):
                    found.append(int(path.parent.name))
            except OSError:  # another's, or gone
                continue
        return found


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    """A checkout with one commit."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "program.py").write_text(PROGRAM)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=program"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    return folder


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = World(tmp_path)
    monkeypatch.setenv("WORLD", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    yield made
    for process in made.alive():
        os.kill(process, signal.SIGKILL)


def pod(*plans: str, **changes) -> Pod:
    command = shlex.join(["python", "-S", "program.py", "WORKDIR", *plans]).replace("WORKDIR", "{workdir}")
    fields: dict[str, Any] = {"name": "pe", "project": "p", "zone": "z", "accelerator": "v6e-8", "workdir": "gs://b/w"}
    return Pod(**fields | {"command": command, "packages": ("jax==0.10.2",)} | changes)


def up(source: pathlib.Path, *plans: str, poll: float = 0.05, **changes) -> int:
    return launch.up(Cloud(pod(*plans, **changes), poll=poll, grace=2), source)


def started(cloud: Cloud, source: pathlib.Path):
    cloud.create()
    cloud.install(source)
    cloud.run()


NO_QUOTA = "Quota limit 'TPUV6EPreemptible' has been exceeded. Limit: 0."
UP = ["look", "create", "look", "scp", "install", "run", "look"]  # to a run that is watched


def test_up_creates_installs_runs_streams_and_deletes(world, source, capfd):
    assert up(source) == 0
    assert world.calls() == [*UP, "delete"]
    told = capfd.readouterr().out
    assert re.findall("^step .", told, re.MULTILINE) == [f"step {i}" for i in range(1, 7)]  # of the first host, once
    assert told.count("+ gcloud compute tpus queued-resources describe") == 1  # looks are shown the first time
    for host in ("pe-0", "pe-1"):
        assert world.wrote(f"{host}-steps") == "6"
        assert "step 6" in world.wrote(f"logs/{host}.log")
    assert not world.alive()


def test_the_command_and_the_environment_reach_the_host_as_they_are(world, source):
    tricky = """a 'single', a "double", a $HOME, a `tick`, a \\ and $(date); an end"""
    program = "import os, sys; print([*sys.argv[1:], os.environ['TRICKY']])"
    words = shlex.join(["python", "-c", program, "{workdir}", tricky])
    command = words + " && echo $NOT_SET {} end; exit 0"
    assert up(source, command=command, environment={"TRICKY": tricky}) == 0
    assert world.wrote("logs/pe-0.log") == f"{['gs://b/w', tricky, tricky]}\n{{}} end\n"


def test_several_slices_are_one_request_and_run_the_same_command(world, source):
    assert up(source, slices=2) == 0
    create = next(words for words in world.words() if words[3] == "create")
    assert {"--node-count=2", "--node-prefix=pe"} <= set(create) and "--node-id=pe" not in create
    assert sorted(path.name for path in (world.folder / "bucket/b/w/logs").iterdir()) == [
        f"pe-{node}-{worker}.log" for node in (0, 1) for worker in (0, 1)
    ]
    runs = [words for words in world.words() if "setsid" in words[-1]]
    assert sorted(words[4] for words in runs) == ["pe-0", "pe-1"] and runs[0][-1] == runs[1][-1]


@pytest.mark.parametrize(
    ("provisioning", "flags"), [("spot", {"--spot"}), ("reserved", {"--reserved"}), ("on-demand", set())]
)
def test_provisioning_is_a_flag_of_the_request(world, provisioning, flags):
    Cloud(pod(provisioning=provisioning)).create()
    assert {"--spot", "--reserved"} & set(world.words()[0]) == flags


def test_a_slow_queue_is_waited_for(world, source, capfd):
    world.set(plans=[["WAITING_FOR_RESOURCES"] * 5 + ["PROVISIONING"] * 2 + ["ACTIVE"]])
    assert up(source) == 0
    assert world.calls() == [*UP, "delete"]
    told = [line for line in capfd.readouterr().out.splitlines() if re.fullmatch("[A-Z_]+", line)]
    assert told == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


@pytest.mark.parametrize(
    "changes",
    [
        {"refusals": [f"ERROR: (gcloud) RESOURCE_EXHAUSTED: {NO_QUOTA}\n- x: 1"]},
        {"plans": [["WAITING_FOR_RESOURCES", f"FAILED\t{NO_QUOTA}"]]},
    ],
    ids=["at once", "in the queue"],
)
def test_without_quota_it_ends_and_says_what_to_ask_for(world, source, changes):
    world.set(**changes)
    with pytest.raises(CloudError) as caught:
        up(source)
    for part in (
        NO_QUOTA,
        "p has no quota for 1 x v6e-8 (spot) in z",
        "list",
    ):
        assert part in str(caught.value)
    assert "ssh" not in {words[3] for words in world.words()} and world.calls()[-1] == "delete"


def test_a_preempted_run_goes_on_from_its_state_on_new_slices(world, source, capfd):
    world.on("at-3", "preempt")
    assert up(source, "3=wait") == 0
    assert world.calls() == [*UP, "delete", "create", *UP[2:], "delete"]
    runs = [words for words in world.words() if "setsid" in words[-1]]
    assert runs[0] == runs[1]
    told = capfd.readouterr().out
    assert re.findall("^step .", told, re.MULTILINE)[-3:] == ["step 4", "step 5", "step 6"]
    assert "SUSPENDED\nrestart 1, on new slices" in told


def test_a_host_that_dies_has_its_slices_replaced(world, source, capfd):
    world.on("at-3", "die")
    assert up(source, "3=wait") == 0
    assert world.calls() == [*UP, "delete", "create", *UP[2:], "delete"]
    assert "a host does not answer (3 of 3 looks)\nrestart 1, on new slices" in capfd.readouterr().out


def test_a_host_that_the_cloud_replaced_is_installed_again_and_all_start_anew(world, source):
    world.on("at-3", "replace")
    assert up(source, "3=wait") == 0
    assert world.calls() == [*UP, "stop", "scp", "install", "run", "look", "delete"]
    assert world.wrote("pe-0-steps") == world.wrote("pe-1-steps") == "6"


@pytest.mark.parametrize("how", ["saved", "killed"])
def test_a_run_that_stopped_before_its_end_is_started_again_where_it_is(world, source, capfd, how):
    if how == "killed":
        world.on("at-3", "kill")
    assert up(source, "3=75" if how == "saved" else "3=wait") == 0
    assert world.calls() == [*UP, "stop", "run", "look", "delete"]
    assert re.findall("step .", world.wrote("logs/pe-1.log")) == [f"step {i}" for i in range(1, 7)]  # of both starts
    assert re.findall("^step .", capfd.readouterr().out, re.MULTILINE) == [f"step {i}" for i in range(1, 7)]


def test_a_program_that_fails_stops_all_hosts_and_is_not_started_again(world, source, capfd):
    cloud = Cloud(pod("pe-0:3=wait", "pe-1:3=2"), poll=0.05, grace=2)
    assert launch.up(cloud, source, keep=True) == 1
    assert world.calls() == [*UP, "failures", "stop"]
    assert not world.alive()
    told = capfd.readouterr().out
    assert "the program failed, with exit codes 2, running" in told
    assert "--- pe-1, exit code 2\nstep 1\nstep 2\nstep 3\n" in told and "--- pe-0" not in told
    assert "kept: 8 chips" in told


def test_hosts_that_fail_for_want_of_a_lost_one_are_no_failure_of_the_program(capsys):
    cloud = Cloud(pod(), dry=True)
    looks = [("ACTIVE", ["134", "running"]), ("SUSPENDED", []), ("ACTIVE", ["bare"]), ("ACTIVE", ["0", "0"])]
    cloud.state = iter([(state, "") for state, _ in looks]).__next__
    cloud.ask = iter([told for state, told in looks if state == "ACTIVE"]).__next__
    assert launch.watch(cloud, ROOT) == 0
    assert "queued-resources create" in capsys.readouterr().out


def test_a_run_that_is_stopped_saves_and_its_own_exit_code_is_kept(world, source):
    cloud = Cloud(pod("3=wait"), grace=9)
    started(cloud, source)
    while not (world.folder / "bucket/b/w/pe-1-at-3").exists() or not (world.folder / "bucket/b/w/pe-0-at-3").exists():
        time.sleep(0.02)
    cloud.stop()
    assert cloud.ask() == ["75", "75"] and not world.alive()
    assert (world.folder / "bucket/b/w/pe-0-saved").exists() and (world.folder / "bucket/b/w/pe-1-saved").exists()


def test_a_run_that_does_not_heed_sigterm_is_killed(world, source):
    command = "trap '' TERM; python -c 'import time; time.sleep(60)' {workdir}; sleep 60"
    cloud = Cloud(pod(command=command), grace=1)
    started(cloud, source)
    assert cloud.ask() == ["running", "running"]
    cloud.stop()
    assert cloud.ask() == ["gone", "gone"] and not world.alive()


def test_slices_that_someone_deleted_are_not_created_again(world, source, capfd):
    world.on("at-3", "delete")
    assert up(source, "3=wait") == 1
    assert world.calls().count("create") == 1
    assert "someone deleted the slices" in capfd.readouterr().out


def test_it_gives_up_after_so_many_restarts(world, source, capfd):
    assert up(source, "1=75", "2=75", "3=75", restarts=2) == 1
    assert world.calls() == [*UP, "stop", "run", "look", "stop", "run", "look", "delete"]
    assert "given up after 2 restarts" in capfd.readouterr().out


def test_a_refusal_after_a_preemption_is_tried_again(world, source, capfd):
    world.on("at-3", "preempt")
    state = world.folder / "state.json"
    cloud = Cloud(pod("3=wait", "5=75"), poll=0.05)
    create = cloud.create

    def refused_once():
        create()
        changed = json.loads(state.read_text()) | {"refusals": ["ERROR: Quota limit has been exceeded."] * 2}
        state.write_text(json.dumps(changed))
        cloud.create = create

    cloud.create = refused_once
    assert launch.up(cloud, source) == 0
    assert world.calls().count("create") == 4
    told = capfd.readouterr().out
    assert re.findall("^restart .*", told, re.MULTILINE) == [
        "restart 1, on new slices",
        "restart 2, on the same slices",
    ]


def test_a_network_that_fails_for_a_while_changes_nothing(world, source, capfd):
    world.on("at-3", "offline")
    assert up(source, "3=75") == 0
    assert world.calls().count("create") == 1
    assert "UNKNOWN: ERROR: (gcloud) There was a problem" in capfd.readouterr().out


def test_an_install_that_fails_five_times_ends_it_with_the_hosts_own_words(world, source):
    with pytest.raises(CloudError, match=r"(?s)a host of pe refused.*error: no such thing as.*nonsense"):
        up(source, packages=("nonsense",), poll=0.01)
    assert world.calls() == [*UP[:3], *["scp", "install", "look"] * 4, "scp", "install", "delete"]


def test_up_goes_on_with_a_run_that_is_there(world, source):
    cloud = Cloud(pod("3=75"), poll=0.05)
    started(cloud, source)
    assert up(source) == 0
    assert world.calls() == ["create", "scp", "install", "run", "look", "stop", "run", "look", "delete"]


def test_a_deletion_is_tried_again_and_its_failure_is_told(world, capsys):
    world.set(looks=["ACTIVE"], stuck=2)
    Cloud(pod(), poll=0).delete()
    assert world.calls() == ["delete"] * 3
    world.set(looks=["ACTIVE"], stuck=99)
    with pytest.raises(CloudError, match=r"NOT DELETED, 8 chips .* may still cost"):
        Cloud(pod(), poll=0).delete()


def toml(world: World, **changes) -> str:
    """A file of `pod(**changes)`."""
    fields = {name: value for name, value in vars(pod(**changes)).items() if value not in ("", (), {})}
    path = world.folder / "pod.toml"
    path.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in fields.items()))
    return f"--pod={path}"


def interrupted(world: World, *words: str, when: list[str]) -> str:
    """What a launcher told that got Ctrl-C in its terminal when these files were there."""
    with subprocess.Popen(
        [sys.executable, "-m", "tpu.launch", *words, "--poll=0.05"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        # Where the tests run in the background, the shell has Ctrl-C ignored, and children inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as running:  # fmt: skip
        begun = time.monotonic()
        while not all((world.folder / name).exists() for name in when):
            assert running.poll() is None and time.monotonic() < begun + 60
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGINT)
        told = running.communicate(timeout=60)[0]
    assert running.returncode == 130, told
    return told


def test_an_interrupt_saves_the_run_and_deletes_the_slices(world, source):
    file = toml(world, command=f"python -S {source}/program.py {{workdir}} 3=wait")
    hosts = ("pe-0", "pe-1")
    told = interrupted(world, "up", file, when=[f"bucket/b/w/{host}-at-3" for host in hosts])
    assert "interrupted: the run is told to save" in told
    assert world.calls()[-2:] == ["stop", "delete"]
    assert all((world.folder / f"bucket/b/w/{host}-saved").exists() for host in hosts)


def test_an_interrupt_waits_for_a_request_that_is_being_made(world):
    """Broken off, it would leave open whether there will be slices."""
    world.set(slow=1, plans=[["WAITING_FOR_RESOURCES"]])
    interrupted(world, "up", toml(world), when=["asked"])
    assert world.calls() == ["look", "create", "stop", "delete"]
    assert (world.folder / "hosts").exists()  # created, to the end
    assert json.loads((world.folder / "state.json").read_text())["looks"] == []  # and deleted


def test_each_step_is_an_action_of_its_own(world, capfd):
    file = toml(world, command="true {workdir}")
    for action in ("create", "install", "run"):
        assert launch.main([action, file]) == 0
    time.sleep(0.2)
    assert launch.main(["status", file]) == 0
    told = capfd.readouterr().out
    assert "\npe: ACTIVE\n" in told
    assert "\nheld: 8 chips (1 x v6e-8, spot; usd_per_chip_hour is not given)\nhosts: 2 x 0\n" in told
    assert launch.main(["watch", file]) == 0
    assert launch.main(["stop", file]) == 0
    assert launch.main(["delete", file]) == 0
    assert launch.main(["delete", file]) == 0  # again is no error
    assert launch.main(["fetch", file, f"--to={world.folder}/fetched"]) == 0
    assert sorted(path.name for path in (world.folder / "fetched/logs").iterdir()) == ["pe-0.log", "pe-1.log"]
    assert world.calls() == ["create", "scp", "install", "look", "run", "look", "stop", "delete", "delete"]


def test_a_second_run_beside_one_that_goes_on_is_refused(world, source, capfd):
    cloud = Cloud(pod("1=wait"))
    started(cloud, source)
    assert launch.main(["run", toml(world)]) == 2
    assert "a run is going on there" in capfd.readouterr().err
    assert world.calls().count("run") == 1


def test_gcloud_that_is_missing_or_not_signed_in_is_told(world, capsys, monkeypatch):
    world.set(offline=9)
    assert launch.main(["up", toml(world)]) == 2
    assert "the state of pe is not known: ERROR: (gcloud) There was a problem" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert launch.main(["up", toml(world)]) == 2
    assert "install the Google Cloud CLI" in capsys.readouterr().err


def test_files_that_are_not_committed_are_told_and_stay_here(world, source, capfd):
    (source / "more.py").touch()
    cloud = Cloud(pod())
    cloud.create()
    cloud.install(source)
    assert "not installed, for they are not committed: 1 files, such as more.py" in capfd.readouterr().out
    assert not (world.folder / "hosts/pe-0/pe_jax_run/more.py").exists()
    with pytest.raises(CloudError, match="cannot be packed; run this from a git checkout with a commit"):
        cloud.install(world.folder / "bin")


def test_the_readme_shows_what_a_dry_run_prints_and_a_dry_run_needs_no_gcloud(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(ROOT)
    assert launch.main(["up", "--pod=tpu/pod.toml", "--dry-run"]) == 0
    shown = (ROOT / "tpu/README.md").read_text().split("up --pod=tpu/pod.toml --dry-run\n```")[1]
    assert shown.split("```text\n")[1].split("```")[0] == capsys.readouterr().out


@pytest.mark.parametrize("action", ["create", "install", "run", "watch", "logs", "status", "stop", "fetch", "delete"])
def test_every_action_has_a_dry_run(action, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert launch.main([action, f"--pod={ROOT}/tpu/pod.toml", "--dry-run"]) == 0
    assert "+ gcloud " in capsys.readouterr().out


def test_the_command_of_the_example_is_one_that_the_trainer_takes(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    python, _, module, *words = shlex.split(launch.read(ROOT / "tpu/pod.toml").command)
    assert (python, module) == ("python", "pe_jax.train")
    assert train.main([*words, "one-too-many"]) == 2  # it complains of nothing else
    assert "unknown arguments one-too-many" in capsys.readouterr().err


def test_it_needs_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules); import tpu.launch; print({'jax', 'numpy', 'pe_jax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


@pytest.mark.parametrize(
    ("accelerator", "slices", "chips"),
    [("v4-512", 1, 256), ("v5p-128", 2, 128), ("v5litepod-256", 1, 256), ("v6e-64", 4, 256)],
)
def test_cores_and_chips_are_counted_as_each_kind_is_named(accelerator, slices, chips):
    held = pod(accelerator=accelerator, slices=slices, usd_per_chip_hour=1.5)
    assert held.chips == chips
    assert f"{chips * 1.5:.0f} USD an hour, {chips * 36:,.0f} a day" in str(held)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("name = 'PE'", "name = 'PE': take at most 50 small letters"),
        ("accelerator = 'tpu7x-64'", "had through GKE"),
        ("accelerator = 'v6e'", "take v4-NUMBER"),
        ("provisioning = 'cheap'", "take one of spot, reserved, on-demand"),
        ("slices = 0", "take 1 or more"),
        ("slices = '2'", "slices = '2': take an integer"),
        ("usd_per_chip_hour = '2'", "take a number"),
        ("packages = 'jax'", "take a list of strings"),
        ("packages = [1]", "take a list of strings"),
        ("workdir = 'runs/x'", "take a folder gs://BUCKET/FOLDER"),
        ("workdir = 'gs://b/a b'", "take a folder gs://BUCKET/FOLDER"),
        ("command = 'python -m pe_jax.train'", "has no {workdir}"),
        ("environment = {A = 1}", "take a table of strings"),
        ("environment = {'a-b' = '1'}", "take the name of a variable"),
        ("command = 'exec python {workdir}'", "leave out exec"),
        ("zones = 'z'", "zones is not known; the keys are name, project, zone"),
        ("slices = ", "Invalid value"),
    ],
)
def test_a_wrong_file_says_what_to_change(tmp_path, change, told):
    key = change.split()[0]
    lines = [line for line in (ROOT / "tpu/pod.toml").read_text().splitlines() if not line.startswith(key)]
    if key == "environment":
        lines = lines[: lines.index(next(line for line in lines if line.startswith("[environment]")))]
    path = tmp_path / "pod.toml"
    path.write_text("\n".join([change, *lines]))
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        launch.read(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_missing_or_lacks_a_key_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"there is no such file; copy tpu/pod\.toml"):
        launch.read(tmp_path / "none.toml")
    (tmp_path / "pod.toml").write_text("name = 'x'")
    with pytest.raises(ValueError, match="project, zone, accelerator, workdir, command is missing"):
        launch.read(tmp_path / "pod.toml")
