//! Plugging and unplugging hot memory: virtio-mem, whose guest may take a part of what is asked; and memory modules, which come
//! whole and stay.
//!
//! Enters: a size, and which piece where there are several. Leaves: so much of it, or as much as the guest has come to. What must
//! never happen: a request on a piece that was not meant.
use super::view::View;
use super::{End, Guest, PERIOD, Patience};
use plimsoll_attach::balloon::UNCOOPERATIVE;
use plimsoll_attach::control::{HotMemory, HotMemoryId, HotplugMethod};
use plimsoll_linux::explain;
use plimsoll_types::{ByteCount, ParseByteCountError};
use std::str::FromStr;
use std::time::Instant;

/// How much hot memory there shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    id: Option<HotMemoryId>,
    size: ByteCount,
}

impl FromStr for Wish {
    type Err = ParseByteCountError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (id, size) = text.rsplit_once('=').map_or((None, text), |(id, size)| (Some(id), size));
        Ok(Self { id: id.map(|id| HotMemoryId(id.to_owned())), size: size.parse()? })
    }
}

/// Asks for the memory and waits for it. Nothing has been asked of the guest if this fails.
pub(super) fn bring(guest: &mut Guest, wish: &Wish, view: &View) -> Result<End, String> {
    let all = guest.control.hot_memory().map_err(|error| explain(&error))?;
    let chosen = choose(&all, wish.id.as_ref())?;
    let size = whole(wish.size, chosen)?;
    if size != wish.size {
        view.note(&format!("{} comes in blocks of {}: {size} is asked for", chosen.id, chosen.block));
    }
    guest.control.request_hot_memory(&chosen.id, size).map_err(|error| explain(&error))?;
    Ok(wait(guest, &chosen.id, size, view))
}

/// The piece that is meant: of that name; or else the only virtio-mem device; or else, without such a device, the modules.
fn choose<'a>(all: &'a [HotMemory], id: Option<&HotMemoryId>) -> Result<&'a HotMemory, String> {
    let names = || all.iter().map(|memory| memory.id.to_string()).collect::<Vec<_>>().join(", ");
    if all.is_empty() {
        let fix = "start it with a virtio-mem device, or with slots and a maximum for memory modules";
        return Err(format!("no memory can be plugged into this machine: {fix}"));
    }
    if let Some(id) = id {
        let found = all.iter().find(|memory| memory.id == *id);
        return found.ok_or_else(|| format!("no hot memory is called {:?}; there are {}", id.0, names()));
    }
    let is_device = |memory: &&HotMemory| memory.method == HotplugMethod::VirtioMem;
    let mut devices = all.iter().filter(is_device);
    match (devices.next(), devices.next(), all) {
        (Some(only), None, _) | (None, _, [only]) => Ok(only),
        _ => Err(format!("there are several pieces of hot memory: say which with ID=SIZE, of {}", names())),
    }
}

/// The size rounded down to what can be asked for.
fn whole(size: ByteCount, memory: &HotMemory) -> Result<ByteCount, String> {
    let rest = size.0.checked_rem(memory.block.0).unwrap_or_default();
    let whole = ByteCount(size.0 - rest);
    if whole == ByteCount(0) && size > whole {
        return Err(format!("{size} is less than the smallest piece of {}: {}", memory.id, memory.block));
    }
    Ok(whole)
}

fn wait(guest: &mut Guest, id: &HotMemoryId, size: ByteCount, view: &View) -> End {
    let (start, mut patience) = (Instant::now(), Patience::new());
    loop {
        let now = Instant::now();
        let look = guest.control.hot_memory().map(|all| all.into_iter().find(|memory| memory.id == *id));
        let plugged = match look {
            Ok(Some(memory)) => {
                view.plug(now.duration_since(start).as_secs_f64(), &memory);
                let Some(plugged) = memory.plugged else {
                    return End::There(format!(
                        "{size} of {id} is asked for; this interface does not tell what the guest took"
                    ));
                };
                Some(plugged)
            }
            // The last module went: a machine without modules may have no such piece.
            Ok(None) => Some(ByteCount(0)),
            Err(error) => {
                view.note(&explain(&error));
                None
            }
        };
        if plugged == Some(size) {
            return End::There(format!("{size} of {id} is plugged"));
        }
        if patience.is_over(plugged, now, UNCOOPERATIVE) {
            let so_far = plugged.map_or_else(|| "an unknown part".to_owned(), |plugged| plugged.to_string());
            return End::Short(format!(
                "{so_far} of {id} is plugged where {size} was asked for, and for {} s the guest has not gone on; \
                 the request stands",
                UNCOOPERATIVE.as_secs()
            ));
        }
        if let Err(why) = guest.wait_until(now + PERIOD) {
            return End::Short(why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(id: &str, method: HotplugMethod) -> HotMemory {
        HotMemory {
            id: HotMemoryId(id.to_owned()),
            method,
            block: ByteCount::mib(2),
            maximum: None,
            requested: ByteCount(0),
            plugged: None,
        }
    }

    #[test]
    fn a_wish_is_a_size_or_a_name_and_a_size() {
        assert_eq!("256M".parse(), Ok(Wish { id: None, size: ByteCount::mib(256) }));
        let named = Wish { id: Some(HotMemoryId("memory modules".to_owned())), size: ByteCount(0) };
        assert_eq!("memory modules=0".parse(), Ok(named));
        assert!("vm0=".parse::<Wish>().is_err());
    }

    #[test]
    fn the_only_device_is_meant_and_of_several_one_must_be_named() {
        let (one, two) = (memory("vm0", HotplugMethod::VirtioMem), memory("vm1", HotplugMethod::VirtioMem));
        let modules = memory("memory modules", HotplugMethod::Acpi);
        let of = |all: &[&HotMemory], id: Option<&str>| {
            let all: Vec<HotMemory> = all.iter().map(|&memory| memory.clone()).collect();
            choose(&all, id.map(|id| HotMemoryId(id.to_owned())).as_ref()).map(|memory| memory.id.0.clone())
        };
        assert_eq!(of(&[&one, &modules], None).as_deref(), Ok("vm0"));
        assert_eq!(of(&[&modules], None).as_deref(), Ok("memory modules"));
        assert_eq!(of(&[&one, &two], Some("vm1")).as_deref(), Ok("vm1"));
        assert!(of(&[&one, &two], None).unwrap_err().ends_with("of vm0, vm1"));
        assert!(of(&[&one], Some("vm7")).unwrap_err().contains("\"vm7\"; there are vm0"));
        assert!(of(&[], None).unwrap_err().contains("no memory can be plugged"));
    }

    #[test]
    fn sizes_are_whole_blocks_and_nothing_is_asked_for_instead_of_less_than_one() {
        let memory = memory("vm0", HotplugMethod::VirtioMem);
        assert_eq!(whole(ByteCount(5 << 20), &memory), Ok(ByteCount::mib(4)));
        assert_eq!(whole(ByteCount(0), &memory), Ok(ByteCount(0)));
        assert!(whole(ByteCount(1 << 20), &memory).unwrap_err().contains("2M"));
    }
}
