//! Relocations packed (DT_RELR): a position independent program without a loader applies them itself, and all it reads for that
//! counts as its memory.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
