//! Builds the hypervisor and leaves it as `$OUT_DIR/image` for `src/lib.rs` to embed.
use plimsoll_inside::Program;

fn main() -> std::io::Result<()> {
    let image = Program {
        package: "image",
        binary: "plimsoll-metal-image",
        flags: "-Crelocation-model=static",
        sources: &[
            "image",
            "caller",
            "src/digest.rs",
            "src/wire.rs",
            "../plimsoll-types/src",
            "../plimsoll-mmu/src",
            "../plimsoll-core/src",
            "../plimsoll-policy/src",
            "../plimsoll-store/src",
            "../plimsoll-guest",
        ],
    };
    image.build("image")
}
