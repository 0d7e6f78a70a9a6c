//! Builds the guests' first process, linked statically, and leaves it as `$OUT_DIR/init` for `src/initramfs.rs` to embed.
use plimsoll_inside::Program;

fn main() -> std::io::Result<()> {
    let init = Program {
        package: "init",
        binary: "plimsoll-stock-init",
        flags: "-Ctarget-feature=+crt-static",
        sources: &[
            "src/protocol.rs",
            "init/src",
            "init/Cargo.toml",
            "init/Cargo.lock",
            "../plimsoll-guest/src",
            "../plimsoll-guest/Cargo.toml",
        ],
    };
    init.build("init")
}
