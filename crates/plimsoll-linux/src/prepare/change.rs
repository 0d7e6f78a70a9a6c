//! One change to a host: what it sets, from what, to what. As values and as the record keeps them.
use crate::system::System;
use crate::zram::{Disk, ZramError};
use plimsoll_types::ByteCount;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A zram device of this boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceId {
    /// N of `/dev/zramN`, which the kernel gives out again.
    pub number: u32,
    /// `diskseq`, which it does not.
    pub disk_sequence: u64,
}

impl DeviceId {
    /// All there are now.
    pub(super) fn all(system: &dyn System) -> Result<Vec<Self>, ZramError> {
        let mut found = Vec::new();
        for disk in Disk::all(system)? {
            // One that has gone since the directory was read is none.
            let id = disk.sequence()?.map(|disk_sequence| Self { number: disk.number(), disk_sequence });
            found.extend(id);
        }
        Ok(found)
    }
}

/// Something that is set on a new zram device, and goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Setting {
    /// The compression algorithm.
    Algorithm,
    /// The second algorithm, for recompression.
    Recompression,
    /// The block device that pages may be written back to.
    WriteBack,
    /// The most memory it may take.
    MemoryLimit,
    /// What it holds, before compression. Fixes all of the above.
    Size,
}

impl Setting {
    /// The device's file.
    pub const fn attribute(self) -> &'static str {
        match self {
            Self::Algorithm => "comp_algorithm",
            Self::Recompression => "recomp_algorithm",
            Self::WriteBack => "backing_dev",
            Self::MemoryLimit => "mem_limit",
            Self::Size => "disksize",
        }
    }

    /// How a new device has it.
    const fn initial(self) -> &'static str {
        match self {
            Self::Algorithm => "the kernel's default",
            Self::Recompression | Self::WriteBack | Self::MemoryLimit => "none",
            Self::Size => "0",
        }
    }
}

/// A parameter of zswap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Parameter {
    /// The compression algorithm.
    Compressor,
    /// The most memory it may take, in percent.
    MaxPoolPercent,
    /// Whether it is on.
    Enabled,
}

impl Parameter {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Compressor => "compressor",
            Self::MaxPoolPercent => "max_pool_percent",
            Self::Enabled => "enabled",
        }
    }

    /// Its file.
    pub fn path(self) -> PathBuf {
        format!("/sys/module/zswap/parameters/{}", self.name()).into()
    }
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "snake_case", deny_unknown_fields)]
pub enum Change {
    /// Adds a zram device.
    AddDevice {
        /// Those that were there just before; empty in a plan.
        known: Vec<DeviceId>,
        /// The new one, once the kernel has made it.
        made: Option<DeviceId>,
    },
    /// Sets something on it.
    Set {
        /// What.
        setting: Setting,
        /// The new value, as the kernel reads it.
        new: String,
    },
    /// Writes the header of a swap area into it.
    Format,
    /// Puts it to use as swap.
    SwapOn {
        /// The kernel fills areas of high priority first.
        priority: i16,
    },
    /// Sets a parameter of zswap.
    SetParameter {
        /// Which.
        parameter: Parameter,
        /// The value before, as the kernel says it.
        old: String,
        /// The new value, likewise.
        new: String,
    },
}

/// A change in three columns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// What is changed.
    pub what: String,
    /// Its value before.
    pub old: String,
    /// Its value after.
    pub new: String,
}

impl Change {
    /// The change as people read it.
    pub fn row(&self) -> Row {
        let row = |what: &str, old: &str, new: &str| Row {
            what: what.to_owned(),
            old: old.to_owned(),
            new: new.to_owned(),
        };
        match self {
            Self::AddDevice { made: None, .. } => {
                row("zram device", "none", "/dev/zramN, N given by the kernel")
            }
            Self::AddDevice { made: Some(device), .. } => {
                row("zram device", "none", &format!("/dev/zram{}", device.number))
            }
            Self::Set { setting, new } => row(setting.attribute(), setting.initial(), &setting.shown(new)),
            Self::Format => row("first page", "zeros", "a swap header"),
            Self::SwapOn { priority } => row("swap", "not in use", &format!("in use, priority {priority}")),
            Self::SetParameter { parameter, old, new } => {
                row(&format!("zswap {}", parameter.name()), old, new)
            }
        }
    }
}

impl Setting {
    /// A value as people write it.
    fn shown(self, value: &str) -> String {
        match (self, value.parse()) {
            (Self::Size | Self::MemoryLimit, Ok(bytes)) => ByteCount(bytes).to_string(),
            _ => value.to_owned(),
        }
    }
}
