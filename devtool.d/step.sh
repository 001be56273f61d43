# shellcheck shell=bash
# Steps: each shows its progress, runs once, and says on failure which it was, why, what to do and where the log is.
: "${cache:?}" "${logs:?}" # from devtool

readonly started=$SECONDS
running_step=

say() {
  printf '[%4ds] %s\n' $((SECONDS - started)) "$*"
}

# give_up WHAT WHAT-TO-DO
give_up() {
  printf 'devtool: %s\n  do:   %s\n' "$1" "$2" >&2
  exit 1
}

need_root() {
  [ "$(id -u)" = 0 ] || give_up "'$1' makes network namespaces, mounts and cgroups, and for that it has to be root." \
    "sudo ./devtool $1"
}

# key_of WORD-OR-FILE...: a key that changes with the words and with the content of the files among them.
key_of() {
  local word
  for word in "$@"; do
    if [ -f "$word" ]; then sha256sum <"$word"; else printf '%s\n' "$word"; fi
  done | sha256sum | cut -d' ' -f1
}

# step NAME KEY WHAT-TO-DO COMMAND...
#
# Runs the command in a subshell with its output in $logs/NAME.log. A step whose KEY is that of its last success is not run
# again; '-' is the key of a step that finds out by itself whether there is anything to do.
step() {
  local name=$1 key=$2 advice=$3
  shift 3
  local slug=${name//[^A-Za-z0-9.]/-}
  local log=$logs/$slug.log stamp=$cache/stamps/$slug
  if [ "$key" != - ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
    say "$name: done before"
    return
  fi
  mkdir -p "$logs" "$cache/stamps"
  rm -f "$stamp"

  # A process group of its own, so that an interrupt reaches all of it.
  set -m
  (
    set -euo pipefail
    "$@"
  ) >"$log" 2>&1 </dev/null &
  running_step=$!
  set +m
  trap 'interrupted' INT TERM
  local begun=$SECONDS status=0
  show_progress "$name" "$log"
  wait "$running_step" || status=$?
  running_step=
  trap - INT TERM

  if [ "$status" -ne 0 ]; then
    printf 'devtool: step "%s" failed (exit status %d).\n  why:\n' "$name" "$status" >&2
    grep -v '^[[:space:]]*$' "$log" | tail -n 8 | cut -c1-300 | sed 's/^/        /' >&2
    printf '  do:   %s\n  log:  %s\n' "$advice" "$log" >&2
    exit 1
  fi
  say "$name: done in $((SECONDS - begun)) s"
  [ "$key" = - ] || printf '%s\n' "$key" >"$stamp"
}

# Shows that the step runs: a line rewritten every second on a terminal, elsewhere a line now and then.
show_progress() {
  local name=$1 log=$2 begun=$SECONDS last
  if [ -t 1 ]; then
    while kill -0 "$running_step" 2>/dev/null; do
      last=$(tail -n 1 "$log" 2>/dev/null | tr -d '\r' | cut -c1-60)
      printf '\r\033[K[%4ds] %s (%ds) %s' $((SECONDS - started)) "$name" $((SECONDS - begun)) "$last"
      sleep 1
    done
    printf '\r\033[K'
  else
    local next=30
    while kill -0 "$running_step" 2>/dev/null; do
      if [ $((SECONDS - begun)) -ge $next ]; then
        say "$name: still at it after ${next} s: $(tail -n 1 "$log" | tr -d '\r' | cut -c1-100)"
        next=$((next * 2))
      fi
      sleep 0.2
    done
  fi
}

interrupted() {
  [ -z "$running_step" ] || kill -TERM -- "-$running_step" 2>/dev/null
  printf '\ndevtool: interrupted\n' >&2
  exit 130
}
