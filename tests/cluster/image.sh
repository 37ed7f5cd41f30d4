#!/usr/bin/env bash
# Builds docker/Dockerfile's targets cpu and score, and uses them as their users would, without a container engine:
# by buildah with chroot isolation. `make test-image` runs it, as root, on Debian or Ubuntu with buildah and debootstrap.
#   BASE         an image to build on; by default a Debian that debootstrap makes, whose interpreter is python3 alone
#   SUITE        that Debian; its Python must be one of 3.11 to 3.14
#   TORCH_INDEX  an index to take torch from, such as PyTorch's own for CPU builds
#   CUDA         1 builds the target cuda, too, and trains in it, on the CPU: 3.2 GB of wheels
#   TESTS        quick tests to run in cpu, of those that read no more of the checkout than tests/
#   TMPDIR       where its storage goes, all of which it deletes; /var/tmp by default
#   STORAGE_DRIVER  buildah's; vfs, the default, works anywhere, and overlay, where it works, is faster and smaller
set -euo pipefail
cd "$(dirname "$0")/../.."

targets=(cpu score ${CUDA:+cuda})

fail() { echo "error: $*" >&2 && exit 1; }
say() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }

(($(id -u) == 0)) || fail "debootstrap and chroot isolation need root"
for tool in buildah debootstrap; do
	command -v $tool >/dev/null || fail "$tool is not installed; on Debian and Ubuntu: apt install buildah debootstrap"
done
[[ -z "$(git status --porcelain -- docker recsys launch configs requirements)" ]] || echo "warning: uncommitted changes are built" >&2

commit=$(git rev-parse HEAD)
work=$(mktemp -d "${TMPDIR:-/var/tmp}/hilorec-image.XXXXXX")
free=$(df --output=avail -BG "$work" | tail -1 | tr -dc 0-9)
store() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver "${STORAGE_DRIVER:-vfs}" "$@"; }

clean() {
	store rm --all >/dev/null 2>&1 || true
	umount "$work/storage/overlay" 2>/dev/null || true
	# Nothing is deleted through a mount that was left behind.
	if grep -q " $work/" /proc/self/mountinfo; then
		echo "error: something is still mounted below $work; unmount it and delete that folder" >&2
	else
		rm -rf --one-file-system "$work"
	fi
}
trap clean EXIT
need=${CUDA:+45}
((free >= ${need:-20})) || fail "$work has $free GB free; ${need:-20} are needed: set TMPDIR"

say "the base"
if [[ -z "${BASE:-}" ]]; then
	debootstrap --variant=minbase --include=python3,python3-venv "${SUITE:-bookworm}" "$work/base" >"$work/log" 2>&1 ||
		fail "debootstrap: $(tail -1 "$work/log")"
	rm -rf "$work"/base/var/{cache/apt,lib/apt/lists}/*
	[[ ! -e "$work/base/usr/bin/python" ]] || fail "the base was to have no python but python3"
	container=$(store from scratch)
	store add --quiet "$container" "$work/base" / >/dev/null
	BASE=localhost/base
	store commit --quiet --rm "$container" "$BASE" >/dev/null
	rm -rf --one-file-system "$work/base"
fi
container=$(store from "$BASE")
python=$(store run --isolation chroot "$container" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
store rm "$container" >/dev/null

# Wheels are fetched here, as this machine's pip is set up to, so that the build needs no network.
say "wheels for Python $python"
mkdir "$work/wheels" "$work/wheels-cuda" "$work/packages"
printf '[global]\nno-index = true\nfind-links = /wheels\n' >"$work/pip.conf"
pip() {
	local command=$1
	shift
	.venv/bin/pip "$command" --quiet --disable-pip-version-check --only-binary=:all: --python-version "$python" "$@" \
		2>"$work/log" || { cat "$work/log" >&2 && fail "pip $command"; }
}
fetch() { pip download --dest "$work/wheels" "$@"; }
pins() { grep -vxFf requirements/dev.txt "requirements/$1.txt"; }
grep '^torch==' requirements/serving.txt >"$work/torch.txt"
if [[ -n "${TORCH_INDEX:-}" ]]; then fetch --no-deps --index-url "$TORCH_INDEX" -r "$work/torch.txt"; fi
fetch --find-links "$work/wheels" -r requirements/serving.txt
fetch --no-deps --find-links "$work/wheels" -r <(pins cpu)
if [[ -n "${CUDA:-}" ]]; then
	# === takes no build that has a version of its own, such as 2.13.0+cpu.
	pip download --dest "$work/wheels-cuda" --no-deps --find-links "$work/wheels" -r <(pins cuda | sed 's/^torch==/torch===/')
fi
pip install --no-deps --target "$work/packages" -r requirements/dev.txt

for target in "${targets[@]}"; do
	say "building $target"
	begun=$SECONDS wheels=$work/wheels
	[[ $target != cuda ]] || wheels=$work/wheels-cuda
	store build --isolation chroot --format docker --file docker/Dockerfile --target $target --tag hilorec:$target \
		--volume "$wheels:/wheels:ro" --volume "$work/pip.conf:/etc/pip.conf:ro" \
		--build-arg BASE="$BASE" --build-arg COMMIT="$commit" . >"$work/log" 2>&1 ||
		{ tail -20 "$work/log" >&2 && fail "$target was not built"; }
	container=$(store from --name $target hilorec:$target)
	say "$target: built in $((SECONDS - begun)) s, $(du -sm "$(store mount $target)" | cut -f1) MB"
done
say "disk: $(du -smx "$work" | cut -f1) MB in all, of which wheels $(du -csm "$work"/wheels* | tail -1 | cut -f1) MB"

for target in cpu ${CUDA:+cuda}; do
	for volume in data outputs; do
		store run --isolation chroot $target touch "/app/$volume/x" || fail "the volume /app/$volume is not the user's"
		store config --volume "/app/$volume-" $target # or buildah lays it over ours
	done
done

# What volumes would be; and a name of its own that resolves nowhere, which every command here runs under.
mkdir "$work/data" "$work/outputs" "$work/theirs" "$work/told"
log=$work/told/log
chown 1000:1000 "$work/data" "$work/outputs" "$work/told"
printf '127.0.0.1 localhost\n' >"$work/nameless"
printf '127.0.0.1 localhost no-such-host.invalid\n' >"$work/hosts"
hosts=$work/nameless
outputs=$work/outputs
# enter TARGET COMMAND...: as `docker run hilorec:TARGET` with another entrypoint; what it says is in the log. The shell
# within writes that: buildah can end before it has passed on the last of it.
enter() {
	local target=$1
	shift
	store run --isolation chroot --hostname no-such-host.invalid --volume "$hosts:/etc/hosts:ro" \
		--volume "$outputs:/app/outputs" --volume "$work/data:/app/data" --env OMP_NUM_THREADS=1 \
		--volume "$PWD/tests:/tests/tests:ro" --volume "$PWD/pyproject.toml:/tests/pyproject.toml:ro" \
		--volume "$PWD/conftest.py:/tests/conftest.py:ro" --volume "$work/packages:/packages:ro" \
		--volume "$work/told:/told" "$target" sh -c 'exec "$@" >/told/log 2>&1' sh "$@" 2>/dev/null
}

say "who runs, and what is not there"
for target in "${targets[@]}"; do
	enter $target sh -c 'test "$(id -u)" = 1000' || fail "$target runs as another user"
	enter $target sh -c '! touch /app/recsys/x' || fail "$target may change its own code"
	enter $target python -c 'import sys, importlib.util as util; sys.exit(any(map(util.find_spec, sys.argv[1:])))' \
		pip pytest mypy moto sqlalchemy || fail "$target holds packages of development"
done
enter cpu getent hosts no-such-host.invalid && fail "the name was not to resolve"

say "training on two ranks where the own name does not resolve"
enter cpu /entrypoint.sh --standalone --nproc_per_node 2 -m recsys.train --config configs/small.yaml ||
	{ tail -20 "$log" >&2 && fail "training failed"; }
grep -q "\"commit\": \"$commit\"" "$work/outputs/small/summary.json" || fail "summary.json lacks the commit"

if [[ -n "${CUDA:-}" ]]; then
	say "the same in cuda"
	enter cuda python -c 'import torch; print("torch", torch.__version__, "of CUDA", torch.version.cuda)' || fail "no torch in cuda"
	grep -E 'of CUDA [0-9]' "$log" || { cat "$log" >&2 && fail "torch is no build of CUDA"; }
	enter cuda /entrypoint.sh python -m recsys.train && fail "it was to ask for a driver"
	[[ "$(cat "$log")" =~ ^error:\ fbgemm-gpu\ needs\ [^$'\n']*$ ]] || { cat "$log" >&2 && fail "one line was to say so"; }
	# What a driver without GPUs would say.
	for name in Init_v2 DeviceGetCount_v2 DeviceGetHandleByIndex_v2 DeviceGetPciInfo_v3 DeviceGetNvLinkState \
		DeviceGetNvLinkRemotePciInfo_v2; do echo "int nvml$name(void) { return 9; }"; done |
		cc -shared -fPIC -o "$work/packages/libnvidia-ml.so.1" -x c -
	enter cuda env LD_LIBRARY_PATH=/packages /entrypoint.sh --standalone --nproc_per_node 2 -m recsys.train \
		--config configs/small.yaml output_dir=outputs/cuda ||
		{ tail -20 "$log" >&2 && fail "training failed in cuda"; }
	grep -q '"fbgemm-gpu"' "$work/outputs/cuda/summary.json" || fail "summary.json names another fbgemm"
fi

say "a folder of root's over outputs"
outputs=$work/theirs
enter cpu /entrypoint.sh python -m recsys.train --config configs/small.yaml && fail "it was to be refused"
outputs=$work/outputs
[[ "$(cat "$log")" =~ ^error:\ output_dir:\ [^$'\n']*$ ]] || { cat "$log" >&2 && fail "one line was to say so"; }

say "doctor, without the name and with it"
enter cpu /entrypoint.sh python -m recsys.doctor --json && fail "doctor was to miss the name"
python3 - "$log" <<-'END' || fail "doctor found something else"
	import json, sys
	said = open(sys.argv[1]).read()  # gloo's warnings first
	found, _ = json.JSONDecoder().raw_decode(said, said.index("{\n"))
	failed = [check["name"] for check in found["checks"] if not check["ok"]]
	sys.exit(failed != ["host name"])
END
hosts=$work/hosts
enter cpu /entrypoint.sh python -m recsys.doctor || { cat "$log" >&2 && fail "doctor"; }

say "TensorBoard, watched as compose does"
.venv/bin/python - >"$work/packages/healthy.py" <<-'END'
	import yaml
	tensorboard = yaml.safe_load(open("docker/compose.yaml"))["services"]["tensorboard"]
	print(tensorboard["healthcheck"]["test"][3].replace("6006", "16006"))
END
enter cpu sh -euc '
	/entrypoint.sh tensorboard --logdir /app/outputs --port 16006 2>/dev/null &
	trap "kill $!" EXIT
	for _ in $(seq 60); do ! python /packages/healthy.py 2>/dev/null || break; sleep 1; done
	python /packages/healthy.py
	python -c "
import urllib.request as web
print(web.urlopen(\"http://127.0.0.1:16006/data/runs\").read().decode())"' || { cat "$log" >&2 && fail "TensorBoard did not answer"; }
grep -q small "$log" || fail "TensorBoard does not show the run: $(cat "$log")"

say "an export in cpu, scored in score"
checkpoints=("$work"/outputs/small/checkpoints/step-*)
enter cpu /entrypoint.sh python -m recsys.export --checkpoint "outputs/small/checkpoints/${checkpoints[-1]##*/}" \
	--output outputs/artifact || { tail -5 "$log" >&2 && fail "export"; }
for target in cpu score; do
	enter $target python -m recsys.predict --artifact outputs/artifact --input 'data/synthetic_small/test/*.parquet' \
		--output outputs/by-$target || { tail -5 "$log" >&2 && fail "predict in $target"; }
	grep -qx '8,000 rows predicted' "$log"
done
diff -r "$work/outputs/by-cpu" "$work/outputs/by-score" || fail "the images predict otherwise"

say "quick tests in cpu"
read -ra tests <<<"${TESTS:-tests/test_runtime.py tests/data/test_order.py tests/model/test_ranker.py}"
enter cpu sh -c 'cd /tests && PYTHONPATH=/packages exec python -m pytest -q -p no:cacheprovider \
	-m "not slow and not cluster" "$@"' sh "${tests[@]}" || { cat "$log" >&2 && fail "tests"; }
tail -1 "$log"

say "all is well"
