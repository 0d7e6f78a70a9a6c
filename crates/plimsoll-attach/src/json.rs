//! How foreign types look in JSON: sizes as numbers of bytes, addresses as the text that `--range` takes.

use plimsoll_sys::procfs::StartTime;
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::ByteCount;
use serde::Serializer;

pub(crate) fn bytes<S: Serializer>(count: &ByteCount, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(count.0)
}

pub(crate) fn range<S: Serializer>(range: &HvaRange, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&crate::ram::show(*range))
}

pub(crate) fn process<S: Serializer>(process: &ProcessId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u32(process.get())
}

pub(crate) fn start<S: Serializer>(start: &StartTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(start.0)
}
