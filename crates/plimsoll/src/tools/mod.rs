//! Tools that see through both stages of a running machine, from outside: `translate`, `maps`, `splinter`, `audit`, `dump`.
//!
//! Enters: which machine, and addresses. Leaves: what the guest's tables and the host's page map say, as text or one JSON object.
//! Exit status 1 is for what was looked at and is not there, 2 for what could not be looked at. What must never happen: a byte of
//! the guest changed, or the guest's word taken for an address that was not looked up.
//!
//! [`machine`]: the machine and its registers. [`born`]: those of machines of our own. [`entry`]: an entry of a table in words.
pub(crate) mod audit;
mod born;
pub(crate) mod dump;
mod entry;
mod machine;
pub(crate) mod maps;
pub(crate) mod splinter;
pub(crate) mod translate;

use plimsoll_linux::explain;

fn said(error: impl std::error::Error) -> String {
    explain(&error)
}

/// Reads an address: hexadecimal, with `0x` or without.
fn parse_address(text: &str) -> Result<u64, String> {
    let digits = text.trim().strip_prefix("0x").unwrap_or(text.trim()).replace('_', "");
    u64::from_str_radix(&digits, 16).map_err(|_| format!("{text:?} is no address: write it in hexadecimal"))
}

/// An address in JSON: text, as everywhere, since numbers of 64 bits are not safe with every reader.
fn hex(address: u64) -> serde_json::Value {
    format!("{address:#x}").into()
}

/// A size of a page, of which a format gives the logarithm.
fn size_of(shift: u32) -> plimsoll_types::ByteCount {
    plimsoll_types::ByteCount(1u64.checked_shl(shift).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_hexadecimal() {
        assert_eq!(parse_address("0xffff_8880"), Ok(0xffff_8880));
        assert_eq!(parse_address("10"), Ok(16));
        for text in ["", "0x", "main", "-1", "fffffffffffffffff"] {
            assert!(parse_address(text).is_err(), "{text}");
        }
    }
}
