# shellcheck shell=bash
# What is built: the programs, the disk with the agent, the guest image.
: "${here:?}" "${cache:?}" # from devtool; step and its kin from step.sh

# Where cargo leaves them: .cargo/config.toml names the target.
readonly built=$here/target/x86_64-unknown-linux-gnu
readonly release=$built/release
readonly guests=$cache/guests

build_everything() {
  local compiler="The log ends with the compiler's words."
  step "programs" - "$compiler" build_programs
  step "agent disk" - "mkfs.erofs is in the package erofs-utils; is the disk full?" build_agent_disk
  step "test bed" - "$compiler" build_test_bed
  build_guest
}

build_programs() {
  cargo build --release --locked \
    -p coreos-kvm-agent -p coreos-kvm-launcher -p coreos-kvm-share -p containerd-shim-coreos-kvm
}

# Same agent, same bytes: time stamps, owner and UUID are fixed. Then the file stays, and with it the templates that were made with it.
build_agent_disk() {
  local content disk=$release/agent.erofs
  content=$(mktemp -d)
  install -m 0755 "$release/coreos-kvm-agent" "$content/coreos-kvm-agent"
  mkfs.erofs --quiet -T0 -U 00000000-0000-0000-0000-000000000000 --all-root "$disk.new" "$content"
  rm -r "$content"
  if cmp --silent "$disk.new" "$disk"; then rm "$disk.new"; else mv "$disk.new" "$disk"; fi
}

# The demonstration and the benchmarks only drive what is measured: the development profile will do.
build_test_bed() {
  cargo build --locked -p kubeception-tests --bins
}

# What runs inside of it is measured as it is released.
build_stopwatch() {
  cargo build --release --locked -p coreos-kvm-ignition --example stopwatch
}

# guest/build finds out by content whether there is anything to do.
build_guest() {
  step "guest image" - "A package that cannot be fetched: check the network; else the log tells." \
    "$here/guest/build" --output "$guests/reference" --cache "$cache"
}
