#!/usr/bin/env bash
# tests/nix.sh [LIB]: the Nix files, the NixOS module and the README's systemd unit, checked without a NixOS.
# LIB is the lib folder of nixpkgs; without it $NIXPKGS_LIB, then <nixpkgs/lib>. What is not installed is skipped, loudly.
set -euo pipefail
lib=${1:-${NIXPKGS_LIB:-}}
lib=${lib:+$(realpath "$lib")}
cd "$(dirname "$0")/.."
readme=${README:-README.md}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { echo "nix: $*"; }
skip() { echo "nix: SKIPPED: $*" >&2; }
fail() {
    echo "nix: FAILED: $*" >&2
    exit 1
}
has() { command -v "$1" > /dev/null; }

# blocks LANGUAGE TEXT: the README's fenced blocks of that language that begin with that text, as files of $work.
blocks() {
    python3 - "$readme" "$work" "$@" << 'PYTHON'
import pathlib, re, sys
readme, work, language, text = sys.argv[1:]
found = re.findall(rf"^```{language}\n(.*?)^```$", pathlib.Path(readme).read_text(), re.M | re.S)
for number, block in enumerate(b for b in found if b.startswith(text)):
    path = pathlib.Path(work, f"readme-{number}.{language}")
    path.write_text(block)
    print(path)
PYTHON
}

# exposed FILE: fails when systemd thinks the unit more exposed than 1.5 of 10.
exposed() {
    has systemd-analyze || { skip "systemd-analyze is not installed: the exposure of $1"; return; }
    systemd-analyze security --offline=true --no-pager --threshold=15 "$1" > "$work/exposure" ||
        fail "$1: $(grep -F Overall "$work/exposure")"
    say "$(basename "$1"):$(sed -n 's/.*Overall exposure level for [^:]*:/ exposure/p' "$work/exposure")"
}

# ── the README's unit ──
mapfile -t units < <(blocks ini '[Unit]')
[ ${#units[@]} = 1 ] || fail "$readme has ${#units[@]} systemd units, not one"
mv "${units[0]}" "$work/ai-mux.service"
exposed "$work/ai-mux.service"
if has systemd-analyze; then
    sed 's|^ExecStart=.*|ExecStart=/bin/true|' "$work/ai-mux.service" > "$work/verify.service"
    faults=$(systemd-analyze verify --man=no "$work/verify.service" 2>&1 | grep -F verify.service || true)
    [ -z "$faults" ] || fail "the README's unit: $faults"
fi

# ── the Nix files ──
if has nixfmt; then nixfmt --check ./*.nix tests/*.nix; else skip "nixfmt is not installed (cargo install nixfmt_rs)"; fi
if has deadnix; then deadnix --fail ./*.nix tests; else skip "deadnix is not installed (cargo install deadnix)"; fi
if ! has nix-instantiate; then
    skip "Nix is not installed: neither parsed nor evaluated"
    exit 0
fi
# Nothing is built or stored, so that no daemon and no rights are needed.
export NIX_STATE_DIR=$work/state NIX_STORE_DIR=/nix/store NIX_REMOTE=
for file in ./*.nix tests/*.nix; do
    nix-instantiate --parse "$file" > /dev/null || fail "$file does not parse"
done
say "the Nix files parse"

# ── the module and the flake ──
[ -n "$lib" ] || lib=$(nix-instantiate --find-file nixpkgs/lib 2> /dev/null || true)
if [ -z "$lib" ]; then
    skip "no nixpkgs: module and flake are NOT evaluated (tests/nix.sh LIB, or NIXPKGS_LIB)"
    exit 0
fi
text=not-for-the-store
echo "$text" > "$work/secret"
evaluate() {
    nix-instantiate --eval --strict --json tests/nix.nix --argstr nixpkgsLib "$lib" \
        --argstr secret "$work/secret" --argstr secretText "$text" "$@"
}
# string ATTRIBUTE: its text.
string() { evaluate -A "$1" | python3 -c 'import json, sys; sys.stdout.write(json.load(sys.stdin))'; }

broken=$(evaluate -A broken)
[ "$broken" = '[]' ] || fail "does not hold: $broken"
say "right configurations and the flake are as they should be"

evaluate -A messages | python3 -c '
import json, sys
for name, says in json.load(sys.stdin).items():
    print(name, says, sep="\t")' > "$work/wrong"
while IFS=$'\t' read -r name says; do
    if evaluate -A "wrong.\"$name\".text" > /dev/null 2> "$work/error"; then fail "accepted: $name"; fi
    grep -qF -- "$says" "$work/error" || fail "$name: no word of «$says» in: $(cat "$work/error")"
done < "$work/wrong"
say "$(wc -l < "$work/wrong") wrong configurations are refused with their message"

for unit in plain low; do
    string "units.$unit" > "$work/$unit.service"
    exposed "$work/$unit.service"
done

# Both units have the same settings, but for the program and its tokens, and what DynamicUser= brings anyway.
own='^(ExecStart|LoadCredential|NoNewPrivileges|PrivateTmp|RemoveIPC|RestrictSUIDSGID|ProtectSystem)='
diff <(sed -n '/^\[Service\]/,/^\[Install\]/p' "$work/ai-mux.service" | grep '=' | grep -vE "$own" | sort) \
    <(grep '=' "$work/plain.service" | grep -vE "$own" | sort) || fail "the README's unit is not the module's"

mapfile -t examples < <(blocks nix services.ai-mux)
[ ${#examples[@]} -gt 0 ] || fail "$readme shows no configuration of the module"
for example in "${examples[@]}"; do
    config="{ $(cat "$example") }"
    evaluate --arg config "$config" -A readme > /dev/null || fail "does not evaluate: $config"
done
say "the README's unit is the module's, and its ${#examples[@]} configurations evaluate"

# ── the VM test, which only a NixOS can run ──
string vm.testScript > "$work/test.py"
string vm.vendor > "$work/vendor.py"
python3 -m py_compile "$work/test.py" "$work/vendor.py"
say "the VM test evaluates (it is NOT run here)"
