//! Builds the freestanding guest image and leaves it as `$OUT_DIR/guest-image` for `src/boot.rs` to embed.
use plimsoll_inside::Program;

fn main() -> std::io::Result<()> {
    let image = Program {
        package: "../plimsoll-guest/image",
        binary: "plimsoll-guest-image",
        flags: "-Crelocation-model=static",
        sources: &[
            "../plimsoll-guest/src",
            "../plimsoll-guest/Cargo.toml",
            "../plimsoll-guest/image/src",
            "../plimsoll-guest/image/image.ld",
            "../plimsoll-guest/image/build.rs",
            "../plimsoll-guest/image/Cargo.toml",
            "../plimsoll-guest/image/Cargo.lock",
        ],
    };
    image.build("guest-image")
}
