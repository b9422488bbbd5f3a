//! The agent is loaded at every boot: its release binary carries no symbols. The profile's `strip` leaves those of the
//! static C library in.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        println!("cargo:rustc-link-arg-bins=-Wl,--strip-all");
    }
}
