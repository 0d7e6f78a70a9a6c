//! The hand-over protocol: what is accepted says itself again.
use plimsoll_core::layout::{GuestLayout, Region};
use plimsoll_core::word::Gift;
use plimsoll_linux::uffd::wire::{
    FEATURES_NEEDED, Hello, Item, Op, Outcome, Stop, Ticket, Welcome, decode_reply, decode_request,
    encode_reply, encode_request,
};
use plimsoll_types::{ByteCount, Gpa, Hva, PageIndex, SlotPage};

/// What the reply answers that is read.
const TICKET: Ticket = Ticket { epoch: 3, sequence: 9, op: Op::MoveOut };

fn items() -> [Item; 2] {
    [5, 700].map(|page| Item::new(PageIndex(page), SlotPage(1), 2))
}

/// Reads bytes as each message.
pub(crate) fn read(bytes: &[u8]) -> bool {
    let hello = Hello::decode(bytes, 2);
    if let Ok(hello) = &hello {
        assert_eq!(Hello::decode(&hello.encode(), 2).as_ref(), Ok(hello));
        assert_eq!(hello.layout.regions().len(), hello.hvas.len());
    }
    let welcome = Welcome::decode(bytes);
    if let Ok(welcome) = &welcome {
        assert_eq!(Welcome::decode(&welcome.encode()).as_ref(), Ok(welcome));
    }
    let request = decode_request(bytes);
    if let Ok((ticket, items)) = &request {
        let mut again = Vec::new();
        encode_request(&mut again, *ticket, items);
        assert_eq!(decode_request(&again).as_ref(), Ok(&(*ticket, items.clone())));
    }
    let asked = items();
    let reply = decode_reply(bytes, TICKET, &asked);
    if let Ok(Some(outcomes)) = &reply {
        assert_eq!(outcomes.len(), asked.len());
        // Nobody did more than was asked for.
        assert!(outcomes.iter().zip(&asked).all(|(outcome, item)| outcome.done <= item.pages));
        let mut again = Vec::new();
        encode_reply(&mut again, TICKET, outcomes);
        assert_eq!(decode_reply(&again, TICKET, &asked).as_ref(), Ok(&Some(outcomes.clone())));
    }
    hello.is_ok() || welcome.is_ok() || request.is_ok() || matches!(reply, Ok(Some(_)))
}

fn hello(shard: u32) -> Hello {
    let region = Region { start: Gpa(u64::from(shard) << 30), bytes: ByteCount(1 << 30) };
    Hello {
        name: "machine".to_owned(),
        shard,
        shards: 2,
        layout: GuestLayout::new(vec![region]).unwrap(),
        hvas: vec![Hva((1 << 40) + (u64::from(shard) << 30))],
        airlock_base: Hva(1 << 41),
        airlock_slots: 4,
        features: FEATURES_NEEDED,
    }
}

pub(crate) fn examples() -> Vec<Vec<u8>> {
    let (mut request, mut reply) = (Vec::new(), Vec::new());
    encode_request(&mut request, TICKET, &items());
    let outcomes = [(2, None), (1, Some(Stop::Busy))].map(|(done, stop)| Outcome { done, stop });
    encode_reply(&mut reply, TICKET, &outcomes);
    let accepted = Welcome::Accepted { machine: 3, epoch: 7 };
    let refused = Welcome::Refused { reason: "no room".to_owned() };
    let given = Some(Stop::Given { gift: Gift::Hinted, pages: 1 });
    let outcomes = [(2, None), (1, given)].map(|(done, stop)| Outcome { done, stop });
    let mut told = Vec::new();
    encode_reply(&mut told, TICKET, &outcomes);
    vec![hello(0).encode(), hello(1).encode(), accepted.encode(), refused.encode(), request, reply, told]
}
