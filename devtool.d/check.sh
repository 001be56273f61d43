# shellcheck shell=bash
# Tests, linters, and cleaning up.
: "${here:?}" "${cache:?}" "${logs:?}" "${built:?}" # from devtool; step and its kin from step.sh

readonly cargo_deny_version=0.20.2

# test_everything [FILTER...]
test_everything() {
  need_root test
  setup_everything
  build_everything
  mkdir -p "$logs"
  local outcome=$logs/test-outcome.log failed=0
  : >"$outcome"
  if [ $# -eq 0 ]; then
    say "unit tests"
    cargo test --workspace --locked --no-fail-fast 2>&1 | tee -a "$outcome" || failed=1
  fi
  say "end-to-end tests"
  cargo test --locked -p kubeception-tests --test e2e -- "$@" 2>&1 | tee -a "$outcome" || failed=1
  say "end-to-end tests on machines that boot"
  # How a machine comes up is nothing that containerd takes part in: where none is chosen, one has to do.
  local booted=("$@")
  if [ $# -eq 0 ]; then booted=(--containerd 2.1); fi
  cargo test --locked -p kubeception-tests --test e2e -- --boot "${booted[@]}" 2>&1 | tee -a "$outcome" || failed=1
  if [ $# -eq 0 ]; then
    say "conformance"
    (setup_conformance && "$built/debug/kubeception-conformance") 2>&1 | tee -a "$outcome" || failed=1
  fi
  summary "$outcome" "$failed"
}

# One line for all: what each test program counted, added up. A program that failed without counting is a failure.
summary() {
  local outcome=$1 failed=$2 counts passed missed
  counts=$(awk '/^test result: / {
      for (i = 2; i <= NF; i++) { if ($i ~ /^passed/) p += $(i - 1); if ($i ~ /^failed/) f += $(i - 1) }
    } END { print p + 0, f + 0 }' "$outcome")
  passed=${counts% *} missed=${counts#* }
  if [ "$failed" -ne 0 ] && [ "$missed" -eq 0 ]; then
    missed=1
    echo "A test program did not get as far as its result; see above, or $outcome"
  fi
  say "all tests"
  local verdict=ok
  if [ "$missed" -ne 0 ] || [ "$passed" -eq 0 ]; then verdict=FAILED; fi
  echo "test result: $verdict. $passed passed; $missed failed" | tee "$logs/test-summary.log"
  [ "$missed" -eq 0 ] && [ "$passed" -gt 0 ]
}

lint() {
  need_root lint
  setup_packages
  find_rust
  local advice="The log names file and line."
  step "formatter" - "'cargo fmt' mends it." cargo fmt --all --check
  step "clippy" - "$advice" cargo clippy --workspace --all-targets --locked -- -D warnings
  # No test of cargo's own, and so none of all its targets.
  step "clippy of the trials" - "$advice" cargo clippy --workspace --test e2e --locked -- -D warnings
  step "shellcheck" - "$advice" check_shell
  step "Go" - "'gofmt -w' mends the form; the log has what 'go vet' found." check_go
  # Without optimisation: it is fast enough, and builds in a third of the time.
  CARGO_PROFILE_DEV_DEBUG=0 step "cargo-deny $cargo_deny_version" - \
    "See the log; a network error there means that crates cannot be fetched." \
    setup_tool cargo-deny "$cargo_deny_version" --debug
  step "dependencies" - "deny.toml says what is allowed." check_dependencies
  say "linters: all clean"
}

check_shell() {
  local script scripts=()
  while IFS= read -r script; do
    if [[ $script == *.sh ]] || head -n 1 "$script" | grep -qE '^#!.*\b(ba|da)?sh\b'; then
      scripts+=("$script")
    fi
  done < <(git ls-files --cached --others --exclude-standard -- ':!ignition/corpus')
  printf '%s\n' "${scripts[@]}"
  shellcheck -x "${scripts[@]}"
}

# ignition/oracle, the one place where Go is written.
check_go() {
  local go unformatted
  go=$(find_go "$here/ignition/oracle/go.mod")
  if [ -z "$go" ]; then
    echo "no Go is new enough for ignition/oracle/go.mod; './devtool setup' unpacks one"
    return 1
  fi
  unformatted=$("$(dirname "$go")/gofmt" -l "$here/ignition/oracle")
  if [ -n "$unformatted" ]; then
    printf 'not as gofmt has it: %s\n' "$unformatted"
    return 1
  fi
  go_environment
  cd "$here/ignition/oracle" || return
  "$go" vet ./...
}

# Advisories need their database from outside, so they are not looked up here: the same commit passes or fails alike every day.
check_dependencies() {
  "$cache/tools/bin/cargo-deny" --all-features check bans licenses sources
}

clean() {
  need_root clean
  if [ -x "$built/debug/kubeception-node" ]; then
    "$built/debug/kubeception-node" clean
  fi
  rm -rf "$here/target" "$cache"
  say "clean: removed target/ and $cache"
}
