# shellcheck shell=bash
# The conformance suite of the Container Runtime Interface: critest and what it needs.
: "${here:?}" "${cache:?}" "${built:?}" "${mirror_advice:?}" # from devtool and setup.sh; step and its kin from step.sh

# conformance [--containerd VERSION] [--write] [--focus REGEX] [--only RUNTIME]
conformance() {
  need_root conformance
  setup_everything
  setup_conformance
  build_everything
  say "conformance"
  exec "$built/debug/kubeception-conformance" "$@"
}

setup_conformance() {
  step "critest" "$(key_of "$here"/tests/critest/go.*)" \
    "$mirror_advice; the Go modules come from GOPROXY ('go help goproxy')." setup_critest
  step "registry" "$(key_of "$here/devtool.d/conformance.sh")" "$mirror_advice" setup_registry
}

# critest and crictl, into $cache/tools/go/bin. critest is a test of its module.
setup_critest() {
  local go
  go=$(find_or_unpack_go "$here/tests/critest/go.mod")
  go_environment
  cd "$here/tests/critest" || return
  local bin=$cache/tools/go/bin
  "$go" build -o "$bin/crictl" sigs.k8s.io/cri-tools/cmd/crictl
  "$go" test -c -o "$bin/critest" sigs.k8s.io/cri-tools/cmd/critest
}

# What serves the images that critest pulls; unpacked, never installed.
setup_registry() {
  open_debian "$cache/apt"
  unpack "$cache/apt" docker-registry "" "$cache/registry"
  "$cache/registry/usr/bin/docker-registry" --version
}
