//! The questions about memory, with typed answers. What QEMU leaves out of an answer that older versions do not have is
//! `None`; what should be there and is not is an error that shows the answer.

use super::processors::HMP;
use super::{Qmp, QmpError, beginning};
use plimsoll_types::{ByteCount, Hva};
use serde_json::{Value, json};

/// Whether the vCPUs run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunState {
    /// QEMU's word: `running`, `paused`, `prelaunch`, `inmigrate`, …
    pub status: String,
    /// True when they run.
    pub running: bool,
}

/// The machine's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize {
    /// What it started with.
    pub base: ByteCount,
    /// What memory devices add at the moment.
    pub plugged: ByteCount,
}

/// A memory back end (`-object memory-backend-…`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryBackend {
    /// Its id, in QEMU 2.7 and newer.
    pub id: Option<String>,
    /// Its size.
    pub size: ByteCount,
    /// Mapped shared, in QEMU 6.1 and newer.
    pub share: Option<bool>,
    /// The first of the host's NUMA nodes it is bound to.
    pub node: Option<u32>,
}

/// A device that brings memory (pc-dimm, nvdimm, virtio-mem, virtio-pmem).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryDevice {
    /// `dimm`, `nvdimm`, `virtio-mem`, …
    pub kind: String,
    /// Its id, if it has one.
    pub id: Option<String>,
    /// The id of its memory back end.
    pub backend: String,
    /// What the guest has of it: less than the back end's size for a virtio-mem that is not fully plugged.
    pub size: ByteCount,
}

/// A block of RAM, ROM or device memory, from the monitor's `info ramblock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name: the back end's id, `pc.ram`, or a device's path.
    pub name: String,
    /// What is in use.
    pub used: ByteCount,
    /// What is mapped.
    pub total: ByteCount,
    /// Where it is mapped, in QEMU 8.1 and newer.
    pub hva: Option<Hva>,
}

/// A migration that QEMU knows of, running or past.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    /// `setup`, `active`, `postcopy-active`, `completed`, `failed`, …
    pub status: String,
}

impl Migration {
    /// True while it is under way.
    pub fn is_running(&self) -> bool {
        !matches!(self.status.as_str(), "none" | "completed" | "failed" | "cancelled")
    }
}

impl Qmp {
    /// The machine's name, if it has one.
    pub fn name(&mut self) -> Result<Option<String>, QmpError> {
        Ok(text(&self.execute("query-name", json!({}))?, "name"))
    }

    /// Whether the machine runs.
    pub fn run_state(&mut self) -> Result<RunState, QmpError> {
        let command = "query-status";
        let answer = self.execute(command, json!({}))?;
        let running = answer.get("running").and_then(Value::as_bool);
        Ok(RunState {
            status: text(&answer, "status").ok_or_else(|| unexpected(command, "status", &answer))?,
            running: running.ok_or_else(|| unexpected(command, "running", &answer))?,
        })
    }

    /// The machine's size.
    pub fn memory_size(&mut self) -> Result<MemorySize, QmpError> {
        let command = "query-memory-size-summary";
        let answer = self.execute(command, json!({}))?;
        let base =
            bytes(&answer, "base-memory").ok_or_else(|| unexpected(command, "base-memory", &answer))?;
        Ok(MemorySize { base, plugged: bytes(&answer, "plugged-memory").unwrap_or_default() })
    }

    /// The memory back ends, whether the guest sees them or not.
    pub fn memory_backends(&mut self) -> Result<Vec<MemoryBackend>, QmpError> {
        self.list("query-memdev", "a list of back ends with size", |answer| {
            let node = answer.pointer("/host-nodes/0").and_then(Value::as_u64);
            Some(MemoryBackend {
                id: text(answer, "id"),
                size: bytes(answer, "size")?,
                share: answer.get("share").and_then(Value::as_bool),
                node: node.and_then(|node| u32::try_from(node).ok()),
            })
        })
    }

    /// The memory devices that are plugged in.
    pub fn memory_devices(&mut self) -> Result<Vec<MemoryDevice>, QmpError> {
        self.list("query-memory-devices", "a list of devices with type, memdev and size", |answer| {
            let data = answer.get("data")?;
            let backend = text(data, "memdev")?;
            Some(MemoryDevice {
                kind: text(answer, "type")?,
                id: text(data, "id"),
                backend: backend.rsplit('/').next()?.to_owned(),
                size: bytes(data, "size")?,
            })
        })
    }

    /// All blocks of memory.
    pub fn ram_blocks(&mut self) -> Result<Vec<RamBlock>, QmpError> {
        let text = self.human("info ramblock", None)?;
        parse_ram_blocks(&text).ok_or_else(|| unexpected(HMP, "a table of RAM blocks", &text.into()))
    }

    /// The migration that runs or ran last.
    pub fn migration(&mut self) -> Result<Option<Migration>, QmpError> {
        let answer = self.execute("query-migrate", json!({}))?;
        Ok(text(&answer, "status").map(|status| Migration { status }))
    }

    pub(super) fn list<T>(
        &mut self,
        command: &'static str,
        expected: &'static str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<T>, QmpError> {
        let answer = self.execute(command, json!({}))?;
        let list = answer.as_array().and_then(|list| list.iter().map(read).collect());
        list.ok_or_else(|| unexpected(command, expected, &answer))
    }
}

fn text(answer: &Value, key: &str) -> Option<String> {
    answer.get(key).and_then(Value::as_str).map(str::to_owned)
}

fn bytes(answer: &Value, key: &str) -> Option<ByteCount> {
    answer.get(key).and_then(Value::as_u64).map(ByteCount)
}

pub(super) fn unexpected(command: &'static str, expected: &'static str, answer: &Value) -> QmpError {
    QmpError::Unexpected { command, expected, found: beginning(&answer.to_string()) }
}

/// Reads the table of `info ramblock`: `NAME PSIZE UNIT OFFSET USED TOTAL[ HVA RO]` under a line of titles, or `None` if
/// it is none.
pub fn parse_ram_blocks(text: &str) -> Option<Vec<RamBlock>> {
    let mut lines = text.lines();
    lines.next().filter(|titles| titles.contains("Block Name"))?;
    lines.filter(|line| !line.trim().is_empty()).map(ram_block).collect()
}

fn ram_block(line: &str) -> Option<RamBlock> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    // Names may hold spaces; the offset is the first word in hexadecimal, two after the end of the name.
    let offset = words.iter().position(|word| word.starts_with("0x"))?;
    let hex = |place: usize| {
        let digits = words.get(offset + place)?.strip_prefix("0x")?;
        u64::from_str_radix(digits, 16).ok()
    };
    Some(RamBlock {
        name: words.get(..offset.checked_sub(2)?)?.join(" "),
        used: ByteCount(hex(1)?),
        total: ByteCount(hex(2)?),
        hva: hex(3).map(Hva),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_blocks_is_read_with_and_without_addresses() {
        let old = "              Block Name    PSize              Offset               Used              Total\r\n\
                  \x20                 pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\r\n\
                   /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000\r\n";
        let blocks = parse_ram_blocks(old).unwrap();
        assert_eq!(blocks[0].name, "pc.ram");
        assert_eq!((blocks[0].used, blocks[0].hva), (ByteCount::mib(64), None));
        assert_eq!((blocks[1].used, blocks[1].total), (ByteCount(0x20000), ByteCount::mib(2)));
        let new = "Block Name PSize Offset Used Total HVA RO\n\
                   a b 4 KiB 0x0 0x4000000 0x4000000 0x00007f12c0000000 rw\n";
        let blocks = parse_ram_blocks(new).unwrap();
        assert_eq!((blocks[0].name.as_str(), blocks[0].hva), ("a b", Some(Hva(0x7f12_c000_0000))));
    }

    #[test]
    fn a_text_that_is_no_such_table_is_none() {
        for text in
            ["", "unknown command: 'info ramblock'", "Block Name\nx 0x1 0x2 0x3", "Block Name\na 4 KiB 0xzz"]
        {
            assert_eq!(parse_ram_blocks(text), None, "{text}");
        }
    }

    #[test]
    fn past_migrations_are_not_running() {
        let migration = |status: &str| Migration { status: status.to_owned() };
        assert!(migration("postcopy-active").is_running() && migration("setup").is_running());
        assert!(!migration("completed").is_running() && !migration("failed").is_running());
    }
}
