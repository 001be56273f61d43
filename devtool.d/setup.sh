# shellcheck shell=bash
# What has to be on the machine: packages, Rust, and, in the cache, pinned tools and three containerds.
: "${here:?}" "${cache:?}" # from devtool; step and its kin from step.sh

# Pinned because no distribution of today carries them.
readonly virtiofsd_version=1.14.0
readonly vhost_device_vsock_version=0.3.0
# The containerds that the tests run against, each with the Debian suites that may carry it.
readonly containerd_versions=(1.6.20 1.7.24 2.1.9)
readonly debian_suites=(bookworm trixie forky sid)
# Debian's Go for machines that have none; any release that has what the go.mod of ignition/oracle and tests/critest ask for.
readonly go_release=1.26
readonly mirror_advice="If a mirror cannot be reached, name another one: KUBECEPTION_DEBIAN_MIRROR=URI ./devtool setup"

# Packages by purpose; only those that are missing get installed.
readonly packages_to_build=(
  ca-certificates git gcc libc6-dev pkg-config # the Rust workspace and the pinned tools
  protobuf-compiler                            # the protocols of the agent and of containerd
  libseccomp-dev libcap-ng-dev                 # the agent's containers, virtiofsd
)
readonly packages_for_the_guest=(
  debootstrap mmdebstrap debian-archive-keyring # its root, from Debian's packages
  erofs-utils cpio zstd xz-utils                # its images
)
readonly packages_to_run=(
  qemu-system-x86               # the machine
  iproute2 iptables util-linux  # the pods' networks (CNI's bridge and portmap) and namespaces
  libseccomp2                   # runc
  openssh-client                # what the tests log in with
  jq shellcheck                 # the linters
)

setup_everything() {
  setup_packages
  find_rust
  step "Rust $(pinned_rust)" - "Look into the log; 'rustup toolchain install $(pinned_rust)' by hand says more." setup_rust
  find_rust
  local advice="See the log; a compiler error there usually means a missing -dev package, a network error that crates cannot be fetched."
  step "virtiofsd $virtiofsd_version" - "$advice" setup_tool virtiofsd "$virtiofsd_version"
  step "vhost-device-vsock $vhost_device_vsock_version" - "$advice" \
    setup_tool vhost-device-vsock "$vhost_device_vsock_version"
  step "containerds ${containerd_versions[*]}" "$(key_of "$here/devtool.d/setup.sh")" \
    "$mirror_advice" setup_containerds
  step "Ignition of Debian" "$(key_of "$here/devtool.d/setup.sh")" "$mirror_advice" setup_ignition
  step "Butane, ct and Ignition as oracles" "$(key_of "$here"/ignition/oracle/*)" \
    "$mirror_advice; the Go modules come from GOPROXY ('go help goproxy')." setup_oracles
}

# --- packages ---------------------------------------------------------------------------------------------------------

setup_packages() {
  local wanted=("${packages_to_build[@]}" "${packages_for_the_guest[@]}" "${packages_to_run[@]}") missing=() name
  for name in "${wanted[@]}"; do
    dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null | grep -qx installed || missing+=("$name")
  done
  if [ ${#missing[@]} -eq 0 ]; then
    say "packages: all there"
    return
  fi
  say "packages: ${missing[*]}"
  step "package lists" - "Check the network and /etc/apt/sources.list.d; 'apt-get update' has to work." apt-get -q update
  step "packages" - "Try 'apt-get install ${missing[*]}' by hand; another apt may be running." install_packages "${missing[@]}"
}

install_packages() {
  DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=120 install --no-install-recommends "$@"
}

# --- Rust -------------------------------------------------------------------------------------------------------------

pinned_rust() {
  sed -n 's/^channel *= *"\(.*\)"/\1/p' "$here/rust-toolchain.toml"
}

# sudo resets PATH: looks where rustup puts its programs, too.
find_rust() {
  local folder
  for folder in "${CARGO_HOME:-$HOME/.cargo}/bin" /root/.cargo/bin; do
    case :$PATH: in
      *":$folder:"*) ;;
      *) if [ -x "$folder/cargo" ]; then PATH=$folder:$PATH; fi ;;
    esac
  done
  export PATH
  # Outside this folder, too, and for the tools.
  RUSTUP_TOOLCHAIN=$(pinned_rust)
  export RUSTUP_TOOLCHAIN
}

rust_is_there() {
  [ "$(rustc --version 2>/dev/null | cut -d' ' -f2)" = "$(pinned_rust)" ] &&
    cargo --version && cargo fmt --version && cargo clippy --version
}

setup_rust() {
  if rust_is_there; then
    return
  fi
  if ! command -v rustup; then
    if [ -n "$(apt-cache search --names-only '^rustup$')" ]; then
      install_packages rustup
    else
      # Debian 12 has no such package.
      install_packages curl
      curl --proto '=https' --tlsv1.2 -fsS https://sh.rustup.rs |
        sh -s -- -y --no-modify-path --profile minimal --default-toolchain none
      find_rust
    fi
  fi
  rustup toolchain install "$(pinned_rust)" --profile minimal --component rustfmt --component clippy
  if ! rust_is_there; then
    echo "rustc $(pinned_rust) with rustfmt and clippy is still not to be found"
    return 1
  fi
}

# --- tools from the Rust package registry ------------------------------------------------------------------------------

# setup_tool CRATE VERSION [ARGUMENT...]: into $cache/tools/bin, where the program has its crate's name.
setup_tool() {
  local crate=$1 version=$2
  shift 2
  if "$cache/tools/bin/$crate" --version 2>/dev/null | grep -qwF "$version"; then
    echo "$crate $version is there"
    return
  fi
  # From / because the repository's own .cargo/config.toml is not for tools.
  cd /
  cargo install --locked --force --root "$cache/tools" "$@" "$crate@$version"
}

# --- containerds ------------------------------------------------------------------------------------------------------

# They are unpacked, never installed: an installed containerd would start as the machine's own.
setup_containerds() {
  local apt=$cache/apt version
  open_debian "$apt"
  unpack "$apt" runc "" "$cache/containerd/common"
  unpack "$apt" containernetworking-plugins "" "$cache/containerd/common"
  for version in "${containerd_versions[@]}"; do
    unpack "$apt" containerd "$version" "$cache/containerd/$version"
    "$cache/containerd/$version/usr/bin/containerd" --version
  done
  "$cache/containerd/common/usr/sbin/runc" --version
  # The one program of the test images, and its libraries.
  unpack "$apt" busybox "" "$cache/busybox"
  unpack "$apt" libc6 "" "$cache/busybox"
}

# --- what configurations are judged by ---------------------------------------------------------------------------------

# The first boot's own program and ignition-validate, for the trials; never installed, since its package brings a dracut.
setup_ignition() {
  open_debian "$cache/apt"
  unpack "$cache/apt" ignition "" "$cache/ignition"
  "$cache/ignition/usr/lib/dracut/modules.d/30ignition/ignition" --version
  "$cache/ignition/usr/bin/ignition-validate" --version
}

# ignition/oracle, and the real programs of the same versions, into $cache/tools/go/bin.
setup_oracles() {
  local go
  go=$(find_or_unpack_go "$here/ignition/oracle/go.mod")
  go_environment
  cd "$here/ignition/oracle" || return
  local bin=$cache/tools/go/bin
  "$go" build -o "$bin/oracle" .
  "$go" build -o "$bin/butane" github.com/coreos/butane/internal
  "$go" build -o "$bin/ct" github.com/coreos/container-linux-config-transpiler/internal
  "$go" build -o "$bin/ignition2-validate" github.com/coreos/ignition/validate
  "$go" build -o "$bin/ignition3-validate" github.com/coreos/ignition/v2/validate
}

# Nothing but go.mod and go.sum decides what is built; what is downloaded can be deleted with the cache.
go_environment() {
  export GOTOOLCHAIN=local GOWORK=off CGO_ENABLED=0 GOFLAGS="-mod=readonly -modcacherw -buildvcs=false -trimpath"
  export GOMODCACHE=$cache/go/modules GOCACHE=$cache/go/build
}

# find_or_unpack_go GO.MOD: prints a go that is new enough for a module; Debian's, where the machine has none.
find_or_unpack_go() {
  local go
  go=$(find_go "$1")
  if [ -z "$go" ]; then
    {
      open_debian "$cache/apt"
      unpack "$cache/apt" "golang-$go_release-go" '[0-9.]+' "$cache/golang"
      unpack "$cache/apt" "golang-$go_release-src" '[0-9.]+' "$cache/golang"
    } >&2
    go=$(find_go "$1")
  fi
  echo "$go"
}

# find_go GO.MOD: prints the first go that is new enough for a module, if any.
find_go() {
  local go wanted version
  wanted=$(sed -n 's/^go //p' "$1")
  # sudo resets PATH: looks where Go's own archive is unpacked, too.
  for go in "$(command -v go || true)" /usr/local/go/bin/go "$cache/golang/usr/lib/go-$go_release/bin/go"; do
    [ -x "$go" ] || continue
    version=$(cd / && GOTOOLCHAIN=local "$go" env GOVERSION) || continue
    if printf '%s\n' "$wanted" "${version#go}" | sort -CV; then
      echo "$go"
      return
    fi
  done
}

# --- Debian's packages, unpacked ---------------------------------------------------------------------------------------

# open_debian FOLDER: from here on apt is one of its own that knows all the suites.
open_debian() {
  make_apt_root "$1"
  export APT_CONFIG=$1/apt.conf
  apt-get -q update
}

# An apt that knows several Debian suites and nothing of this machine's.
make_apt_root() {
  local root=$1 keyring=/usr/share/keyrings/debian-archive-keyring.gpg suite mirror
  mirror=$(debian_mirror)
  rm -rf "$root"
  mkdir -p "$root"/{lists,archives}/partial "$root/parts"
  : >"$root/status"
  # A suite's index is taken even after it expired (some mirrors lag): versions are pinned and signatures are checked.
  cat >"$root/apt.conf" <<END
Dir::State "$root";
Dir::State::lists "$root/lists";
Dir::State::status "$root/status";
Dir::Cache "$root";
Dir::Cache::archives "$root/archives";
Dir::Etc::sourcelist "$root/sources.list";
Dir::Etc::sourceparts "$root/parts";
Dir::Etc::parts "$root/parts";
Dir::Etc::preferences "$root/preferences";
Dir::Etc::preferencesparts "$root/parts";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Sandbox::User "root";
Acquire::Check-Valid-Until "false";
Acquire::Languages "none";
END
  for suite in "${debian_suites[@]}"; do
    echo "deb [signed-by=$keyring] $mirror $suite main"
  done >"$root/sources.list"
}

# The mirror that this machine uses if it is a Debian, else the one that the bootstrapping tools know.
debian_mirror() {
  local uri=${KUBECEPTION_DEBIAN_MIRROR:-}
  if [ -z "$uri" ]; then
    # shellcheck disable=SC2016 # apt's own placeholders
    uri=$(apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' 'Created-By: Packages' |
      awk -F'|' '$1 == "Debian" && $2 == "Debian" { print $3; exit }')
  fi
  if [ -z "$uri" ]; then
    uri=$(grep -ohE 'http://[a-z.]+/debian\b' "$(command -v debootstrap)" "$(command -v mmdebstrap)" | head -n 1)
  fi
  if [ -z "$uri" ]; then
    echo "no Debian mirror is known; KUBECEPTION_DEBIAN_MIRROR=URI names one" >&2
    return 1
  fi
  echo "$uri"
}

# With APT_CONFIG set. unpack APT-ROOT PACKAGE UPSTREAM-VERSION FOLDER; UPSTREAM-VERSION is a pattern, the version of the
# oldest suite where it is empty.
unpack() {
  local root=$1 package=$2 upstream=$3 folder=$4 version
  version=$(apt-cache madison "$package" |
    awk -F' *[|] *' -v upstream="$upstream" -v oldest="${debian_suites[0]}/" '
      (upstream != "" && match($2, "^" upstream "[^0-9.]")) || (upstream == "" && index($3, oldest)) { print $2; exit }')
  if [ -z "$version" ]; then
    echo "no Debian suite of ${debian_suites[*]} has $package $upstream any longer;" \
      "pin another version in devtool.d/setup.sh (containerd_versions, go_release)"
    return 1
  fi
  echo "$package $version -> $folder"
  (
    cd "$root/archives" || exit 1
    apt-get -q download "$package=$version"
    mkdir -p "$folder"
    dpkg -x "${package}_${version/:/%3a}"_*.deb "$folder"
  )
}
