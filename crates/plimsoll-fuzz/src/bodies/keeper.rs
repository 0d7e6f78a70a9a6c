//! What keeper and manager say to each other: eight bytes that mean one thing, and lists within their bounds.
use plimsoll_host::keeper::protocol::{
    LISTING_MAX, LISTING_SIZE, Request, Status, decode_listing, encode_listing,
};

/// Descriptors that come with a listing.
const LISTED: usize = 3;

/// Reads bytes as each message.
pub(crate) fn read(bytes: &[u8]) -> bool {
    let requests = [0, 1].map(|descriptors| Request::decode(bytes, descriptors));
    assert!(requests.iter().flatten().all(|request| request.encode() == *bytes));
    let status = Status::decode(bytes);
    let listing = decode_listing(bytes, LISTED);
    if let Some((_, listed)) = &listing {
        assert!(listed.len() == LISTED && LISTED <= LISTING_MAX);
    }
    requests.iter().any(Option::is_some) || status.is_some() || listing.is_some()
}

pub(crate) fn examples() -> Vec<Vec<u8>> {
    let requests = [Request::Keep(9), Request::LetGo(9), Request::List, Request::Serving, Request::Staying];
    let mut listing = [0; LISTING_SIZE];
    let length = encode_listing(&mut listing, 100, &[1, 2, 7]);
    let mut examples: Vec<Vec<u8>> = requests.iter().map(|request| request.encode().to_vec()).collect();
    examples.extend([Status::Done, Status::Refused].map(|status| status.encode(9).to_vec()));
    examples.push(listing[..length].to_vec());
    examples
}
