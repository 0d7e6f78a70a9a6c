//! The memory functions that compiled code calls by name and that no C library provides here.
//!
//! Copying and filling are single string instructions: a loop would be recognised by the compiler as the very
//! function it is in, and call itself.
use core::arch::asm;

/// Copies `len` bytes between ranges that do not overlap.
///
/// # Safety
///
/// `from` is readable and `to` writable for `len` bytes, and they do not overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges. The direction flag is clear at every function's start
    // (System V ABI).
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// Copies `len` bytes between ranges that may overlap.
///
/// # Safety
///
/// `from` is readable and `to` writable for `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= len {
        // SAFETY: the caller vouches for both ranges, and upward is right where `to` is not inside `from`'s
        // range: every byte is read before it is overwritten.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: `to` lies inside the range of `from`, so `len` is not 0 and the last bytes exist; copying
    // downward reads every byte before it is overwritten. The direction flag is set and cleared in here.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") len => _, inout("rdi") to.add(len - 1) => _,
            inout("rsi") from.add(len - 1) => _, options(nostack));
    }
    to
}

/// Fills `len` bytes with the low byte of `value`.
///
/// # Safety
///
/// `to` is writable for `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range. The direction flag is clear. Only `al`, the low byte, is
    // stored.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("eax") value,
            options(nostack, preserves_flags));
    }
    to
}

/// Compares two ranges as unsigned bytes: negative, zero or positive.
///
/// # Safety
///
/// Both ranges are readable for `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    let mut at = 0;
    // Eight bytes at a time up to the first difference: this compares whole pages.
    while len - at >= 8 {
        // SAFETY: `at + 8 <= len`, and the caller vouches for `len` bytes of both.
        let (a, b) = unsafe { (left.add(at).cast::<u64>(), right.add(at).cast::<u64>()) };
        // SAFETY: the same 8 bytes; no alignment is needed.
        if unsafe { a.read_unaligned() != b.read_unaligned() } {
            break;
        }
        at += 8;
    }
    while at < len {
        // SAFETY: `at < len`, and the caller vouches for `len` bytes of both.
        let (a, b) = unsafe { (*left.add(at), *right.add(at)) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
        at += 1;
    }
    0
}

/// Compares two ranges: zero if equal.
///
/// # Safety
///
/// Both ranges are readable for `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    // SAFETY: the caller's promise is the same.
    unsafe { memcmp(left, right, len) }
}
