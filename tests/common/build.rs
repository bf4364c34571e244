//! Builds ai-mux for the demo and the soak: cargo builds only those two when they are run.

use std::process::Command;

/// Has cargo build the program itself, as this one was built.
pub fn build() {
    let mut cargo = Command::new(std::env::var("CARGO").unwrap_or("cargo".to_owned()));
    cargo.args(["build", "--bin", "ai-mux", "--manifest-path"]);
    cargo.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
    // What a running cargo tells its child is news to ring's build script, which would have half of all built anew.
    for (name, _) in std::env::vars_os() {
        let told = |prefix| name.to_string_lossy().starts_with(prefix);
        if told("CARGO_PKG_") || told("CARGO_MANIFEST_") {
            cargo.env_remove(name);
        }
    }
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    assert!(
        cargo.status().is_ok_and(|s| s.success()),
        "cargo could not build ai-mux"
    );
}
