//! What a manager says to its keeper, on a `SOCK_SEQPACKET` socket that nobody else has.
//!
//! Enters and leaves: datagrams, little endian.
//!
//! ```text
//! Request  0 op u32 | 4 slot u32                             with one descriptor for `keep`, none otherwise
//! Answer   0 status u32 | 4 slots there are u32              to `keep` and `let go`
//! Listing  0 count u32 | 4 slots there are u32 | 8 slot u32, count times             with `count` descriptors
//! ```
//!
//! The answer to `list` is listings, of which the last, and only that, holds fewer than [`LISTING_MAX`]. `serving` and `staying`
//! are not answered.

/// The version of this protocol, an argument of the manager's command line.
pub const VERSION: u32 = 2;
/// Most descriptors in one listing: well below the kernel's 253.
pub const LISTING_MAX: usize = 64;
/// Bytes of a request and of an answer.
pub const REQUEST_SIZE: usize = 8;
/// Bytes of the longest listing.
pub const LISTING_SIZE: usize = REQUEST_SIZE + 4 * LISTING_MAX;

/// What the manager asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Put the descriptor that comes along into this slot, which is free. Where there is a supervisor, a machine's is answered when
    /// that was sent it, too.
    Keep(u32),
    /// Close what this slot holds.
    LetGo(u32),
    /// Send a copy of everything that is kept.
    List,
    /// The machines that were kept are served. Said once a second: a manager that says nothing hangs.
    Serving,
    /// It was told to stop and does not: it is to be told again if it is to.
    Staying,
}

/// Whether it was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It was.
    Done,
    /// The slot is taken, does not exist, or holds nothing; or the request made no sense.
    Refused,
    /// It is not kept, because the supervisor that is to store it does not listen.
    Unheard,
}

fn pair(first: u32, second: u32) -> [u8; REQUEST_SIZE] {
    (u64::from(first) | u64::from(second) << 32).to_le_bytes()
}

fn halves(bytes: [u8; REQUEST_SIZE]) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = bytes;
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

impl Request {
    /// As sent.
    pub fn encode(self) -> [u8; REQUEST_SIZE] {
        match self {
            Self::Keep(slot) => pair(1, slot),
            Self::LetGo(slot) => pair(2, slot),
            Self::List => pair(3, 0),
            Self::Serving => pair(4, 0),
            Self::Staying => pair(5, 0),
        }
    }

    /// Of a datagram with so many descriptors; `None` if it is none.
    pub fn decode(bytes: &[u8], descriptors: usize) -> Option<Self> {
        match (halves(bytes.try_into().ok()?), descriptors) {
            ((1, slot), 1) => Some(Self::Keep(slot)),
            ((2, slot), 0) => Some(Self::LetGo(slot)),
            ((3, 0), 0) => Some(Self::List),
            ((4, 0), 0) => Some(Self::Serving),
            ((5, 0), 0) => Some(Self::Staying),
            _ => None,
        }
    }
}

impl Status {
    /// As sent, with the number of slots.
    pub fn encode(self, slots: u32) -> [u8; REQUEST_SIZE] {
        let status = match self {
            Self::Done => 0,
            Self::Refused => 1,
            Self::Unheard => 2,
        };
        pair(status, slots)
    }

    /// Of a datagram; `None` if it is none.
    pub fn decode(bytes: &[u8]) -> Option<(Self, u32)> {
        match halves(bytes.try_into().ok()?) {
            (0, slots) => Some((Self::Done, slots)),
            (1, slots) => Some((Self::Refused, slots)),
            (2, slots) => Some((Self::Unheard, slots)),
            _ => None,
        }
    }
}

/// Writes a listing: how many slots there are, and the numbers of those listed. Returns its length.
pub fn encode_listing(bytes: &mut [u8; LISTING_SIZE], slots: u32, listed: &[u32]) -> usize {
    let count = u32::try_from(listed.len()).unwrap_or(u32::MAX);
    let (head, rest) = bytes.split_at_mut(REQUEST_SIZE);
    head.copy_from_slice(&pair(count, slots));
    for (place, slot) in rest.chunks_exact_mut(4).zip(listed) {
        place.copy_from_slice(&slot.to_le_bytes());
    }
    REQUEST_SIZE + 4 * listed.len().min(LISTING_MAX)
}

/// Reads a listing that came with so many descriptors: how many slots there are, and which were listed. `None` if it is
/// none.
pub fn decode_listing(bytes: &[u8], descriptors: usize) -> Option<(u32, Vec<u32>)> {
    let (head, rest) = bytes.split_first_chunk::<REQUEST_SIZE>()?;
    let (count, slots) = halves(*head);
    let (listed, tail) = rest.as_chunks::<4>();
    let is_whole = tail.is_empty() && listed.len() == descriptors && count as usize == descriptors;
    let listed: Vec<u32> = listed.iter().map(|slot| u32::from_le_bytes(*slot)).collect();
    (is_whole && descriptors <= LISTING_MAX && listed.iter().all(|slot| *slot < slots))
        .then_some((slots, listed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn requests_and_answers_come_out_as_they_went_in(slot: u32, slots: u32) {
            let plain = [Request::LetGo(slot), Request::List, Request::Serving, Request::Staying];
            let plain = plain.map(|request| (request, 0));
            for (request, descriptors) in [(Request::Keep(slot), 1)].into_iter().chain(plain) {
                prop_assert_eq!(Request::decode(&request.encode(), descriptors), Some(request));
                prop_assert_eq!(Request::decode(&request.encode(), 1 - descriptors), None);
            }
            for status in [Status::Done, Status::Refused, Status::Unheard] {
                prop_assert_eq!(Status::decode(&status.encode(slots)), Some((status, slots)));
            }
        }

        #[test]
        fn what_is_no_message_is_none(bytes in prop::collection::vec(any::<u8>(), 0..400), descriptors in 0..70_usize) {
            if let Some(request) = Request::decode(&bytes, descriptors) {
                prop_assert_eq!(&request.encode()[..], &bytes[..]);
            }
            if let Some((slots, listed)) = decode_listing(&bytes, descriptors) {
                let mut again = [0; LISTING_SIZE];
                let length = encode_listing(&mut again, slots, &listed);
                prop_assert_eq!(&again[..length], &bytes[..]);
            }
        }

        #[test]
        fn a_listing_comes_out_as_it_went_in(listed in prop::collection::vec(0..5000_u32, 0..=LISTING_MAX)) {
            let mut bytes = [0; LISTING_SIZE];
            let length = encode_listing(&mut bytes, 5000, &listed);
            prop_assert_eq!(decode_listing(&bytes[..length], listed.len()), Some((5000, listed.clone())));
            prop_assert_eq!(decode_listing(&bytes[..length], listed.len() + 1), None);
            prop_assert_eq!(decode_listing(&bytes[..length - 1], listed.len()), None);
        }
    }
}
