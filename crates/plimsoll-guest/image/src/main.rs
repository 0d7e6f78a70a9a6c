//! The freestanding guest image: [`plimsoll_guest`]'s programs in 64-bit user mode, without a kernel.
//!
//! What enters is the parameter page and the vCPU's index; what leaves goes through ports, see
//! [`plimsoll_guest::abi`]. What must never happen: an access outside the image's window, the vCPU's own
//! stack and channel page, the parameter page, and those pages of workload memory that the layout gives to
//! this vCPU.
//!
//! # Building
//!
//! From a build script of another crate (`PACKAGE` is the folder `plimsoll-guest`):
//!
//! ```text
//! CARGO_ENCODED_RUSTFLAGS=-Crelocation-model=static \
//! $CARGO build --release --locked --target x86_64-unknown-linux-gnu \
//!     --manifest-path PACKAGE/image/Cargo.toml --target-dir $OUT_DIR/guest
//! ```
//!
//! which leaves `$OUT_DIR/guest/x86_64-unknown-linux-gnu/release/plimsoll-guest-image`.
//!
//! * *Set* `CARGO_ENCODED_RUSTFLAGS`, even to the empty string, which also links: it outranks `RUSTFLAGS` and
//!   every configuration file. A `target-cpu=native` from one of those would put AVX into a guest whose
//!   `CR4.OSXSAVE` is clear. With `--target`, flags do not reach build scripts.
//! * *Remove* `RUSTC_WRAPPER`, `RUSTC_WORKSPACE_WRAPPER` and `CARGO_BUILD_RUSTC_WRAPPER`,
//!   `CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER` (`cargo clippy` sets the second to a compiler that produces
//!   nothing), `RUSTFLAGS`, `CARGO_TARGET_DIR`, `CARGO_BUILD_TARGET`, and everything that starts with
//!   `CARGO_PROFILE_` or `CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_`.
//! * Keep `CARGO_MAKEFLAGS`, so that both cargos share their job slots, and `CARGO_HOME`, `RUSTUP_*`, `PATH`.
//! * Rerun when `PACKAGE/{src,build.rs,Cargo.toml}` or
//!   `PACKAGE/image/{src,image.ld,build.rs,Cargo.toml,Cargo.lock}` changes.
//!
//! # Why no kernel
//!
//! A nested host without hardware paging emulates a guest's ring 0 at about a microsecond an instruction and
//! runs its ring 3 natively. No interrupt is ever delivered, so the precompiled `core`, which uses the red
//! zone, is safe here.
#![no_std]
#![no_main]

mod entry;
mod mem;
mod vcpu;

use core::fmt::Write;
use core::panic::PanicInfo;
use entry::Message;
use plimsoll_guest::Guest;
use plimsoll_guest::abi::{MAX_VCPUS, STACK_SIZE, STACKS_GPA};
use vcpu::Vcpu;

/// Runs the vCPU to its end. Nothing is left to return to.
extern "C" fn guest_main(index: u64) -> ! {
    let Some(index) = u32::try_from(index).ok().filter(|&index| index < MAX_VCPUS) else {
        panic!("the vCPU was started with index {index}: use 0 to {}", MAX_VCPUS - 1);
    };
    // SAFETY: `_start` calls this once for a vCPU, with the index the VMM gave it, and the VMM gives each
    // index to one vCPU only (abi, "Start of a vCPU").
    let mut vcpu = unsafe { Vcpu::new(index) };
    let last = Guest::new(&vcpu.params()).and_then(|guest| guest.run(index, &mut vcpu));
    match last {
        Ok(report) => vcpu.done(&report),
        Err(error) => panic!("{error}"),
    }
}

/// Says through the channel page why the vCPU cannot go on.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    // Each vCPU has its own 64 KiB of stack, so the address of a local says which vCPU this is.
    let mut message = Message::EMPTY;
    let stack_offset = ((&raw const message).addr() as u64).saturating_sub(STACKS_GPA);
    let index = u32::try_from(stack_offset / STACK_SIZE).unwrap_or(0).min(MAX_VCPUS - 1);
    // A message too long is cut off: the rest has nowhere to go.
    let _ = write!(message, "{}", info.message());
    if let Some(place) = info.location() {
        let _ = write!(message, " ({}:{})", place.file(), place.line());
    }
    // SAFETY: this vCPU never returns from here, so its other `Vcpu`, if it had one, is not used any more.
    let mut vcpu = unsafe { Vcpu::new(index) };
    vcpu.panicked(&message.bytes, message.len)
}
