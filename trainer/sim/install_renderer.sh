#!/bin/sh
# Installs the software Vulkan renderer (lavapipe, from Mesa) that ManiSkill draws its camera images with.
#
#   STOKER_PYTHON=$(command -v python) sh trainer/sim/install_renderer.sh            install what is missing, then check
#   STOKER_PYTHON=$(command -v python) sh trainer/sim/install_renderer.sh --check    change nothing: only check
#
# Exit code 0: a picture was drawn. 1: it could not be drawn, or installing failed. 3: installed, but nothing could be drawn with,
# because that Python has no sapien.
# STOKER_PYTHON names the Python whose sapien draws the picture (default: python3). Start it as root or as a user who may use
# sudo: only the installation runs as root, the picture is drawn as you.
# Why: SAPIEN, ManiSkill's engine, needs lavapipe from Mesa 24.3 or newer on a machine without a GPU.
# Debian 12 carries 22.3, with which SAPIEN says "failed to find a rendering device"; its backports suite carries 25.
# What it changes: one file, /etc/apt/sources.list.d/<codename>-backports.sources, which points at the mirror and the
# keyring that this machine's own apt sources already use, and the package mesa-vulkan-drivers (with libvulkan1).
# Backports never replace other packages by themselves: only what is asked for with `-t` comes from them.
# Idempotent: a second run changes nothing. A machine whose Mesa is new enough is left alone.
set -eu

NEEDED_MESA=24.3
PYTHON=${STOKER_PYTHON:-python3}

say() { echo "install_renderer: $*"; }
die() { echo "install_renderer: $*" >&2; exit 1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

mesa_version() { dpkg-query -W -f '${db:Status-Abbrev} ${Version}' mesa-vulkan-drivers 2>/dev/null | sed -n 's/^ii *//p'; }

mesa_is_new_enough() {
    version=$(mesa_version)
    [ -n "$version" ] && dpkg --compare-versions "$version" ge "$NEEDED_MESA"
}

# Draws one 8x8 picture on the CPU: 0 drawn, 1 not drawn, 3 no sapien in this Python (nothing can be said).
draw_one_picture() {
    "$PYTHON" - <<'PYTHON'
import importlib.util
import sys

if importlib.util.find_spec("sapien") is None:
    sys.exit(3)
import sapien

scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem("cpu")])
camera = scene.add_camera("check", 8, 8, 1.0, 0.1, 10.0)
scene.update_render()
camera.take_picture()
assert camera.get_picture("Color").shape == (8, 8, 4)
PYTHON
}

check() {
    mesa_is_new_enough || die "mesa-vulkan-drivers is '$(mesa_version)', needed: $NEEDED_MESA or newer; run: sh $0"
    result=0
    draw_one_picture || result=$?
    case $result in
        0) say "ok: mesa-vulkan-drivers $(mesa_version), and $PYTHON drew a picture with sapien" ;;
        3) echo "install_renderer: mesa-vulkan-drivers $(mesa_version) is installed, but $PYTHON has no sapien, so no picture was" \
               "drawn: pip install 'stoker[sim]', then: STOKER_PYTHON=<that python> sh $0 --check" >&2
           exit 3 ;;
        *) die "mesa-vulkan-drivers $(mesa_version) is installed, but sapien in $PYTHON could not draw (see above)" ;;
    esac
}

# Adds the backports suite at the mirror and with the keyring of the machine's own Debian sources.
add_backports() {
    . /etc/os-release
    [ "${ID:-}" = debian ] || die "this is ${PRETTY_NAME:-not Debian}: install Mesa's Vulkan drivers >= $NEEDED_MESA its own way, then: sh $0 --check"
    suite="${VERSION_CODENAME}-backports"
    targets=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI) $(SOURCESENTRY)')
    if echo "$targets" | grep -q "^$suite main "; then
        say "$suite is among the apt sources already"
        return
    fi
    entry=$(echo "$targets" | grep "^$VERSION_CODENAME main " | head -n 1)
    [ -n "$entry" ] || die "found no '$VERSION_CODENAME main' among the apt sources (apt-get indextargets): add $suite by hand"
    mirror=$(echo "$entry" | cut -d ' ' -f 3)
    sources_file=$(echo "$entry" | cut -d ' ' -f 4- | sed 's/:[0-9]*$//')
    # Both forms of a source: "Signed-By: FILE" (deb822) and "deb [signed-by=FILE] URI ..." (one line). None is legal.
    keyring=$(sed -n -e 's/^Signed-By: *\(\/[^ ]*\).*/\1/p' -e "/$VERSION_CODENAME/s/^deb.*signed-by=\([^] ]*\).*/\1/p" "$sources_file" | head -n 1)
    file="/etc/apt/sources.list.d/$suite.sources"
    {
        printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$mirror" "$suite"
        [ -z "$keyring" ] || printf 'Signed-By: %s\n' "$keyring"
    } | as_root tee "$file" >/dev/null
    say "wrote $file ($suite at the mirror of $sources_file)"
}

install() {
    if mesa_is_new_enough; then
        say "mesa-vulkan-drivers $(mesa_version) is new enough, nothing to install"
        return
    fi
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || die "installing needs root and there is no sudo: run it as root"
    command -v apt-get >/dev/null || die "no apt-get here: install Mesa's Vulkan drivers >= $NEEDED_MESA, then: sh $0 --check"
    add_backports
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends -t "$suite" mesa-vulkan-drivers libvulkan1
}

case ${1:-} in
    "") install; check ;;
    --check) check ;;
    *) sed -n '2,17s/^# \{0,1\}//p' "$0"; [ "$1" = --help ] || exit 2 ;;
esac
