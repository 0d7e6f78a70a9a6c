//! What a client is told when something is not done: a code that stays, a sentence that says what was found, and help.
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use utoipa::openapi::{ContentBuilder, Ref, RefOr, ResponseBuilder};
use utoipa::{IntoResponses, ToSchema};

/// What kind of thing went wrong. A code is never renamed, and keeps its status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request is not to be understood.
    BadRequest,
    /// The client may not ask.
    Forbidden,
    /// There is nothing of that name.
    NotFound,
    /// That cannot be done to it.
    MethodNotAllowed,
    /// It contradicts what is in force.
    Conflict,
    /// The request is too large.
    TooLarge,
    /// The body is no JSON, by its own word.
    UnsupportedMediaType,
    /// A value cannot be.
    Unprocessable,
    /// Others ask too much.
    TooMany,
    /// The daemon could not do it.
    Failed,
    /// The daemon is busy.
    Busy,
    /// The daemon does it, and has not come to its end.
    Late,
}

/// Of each code: its status, and what to do.
const CODES: [(Code, StatusCode, &str); 12] = [
    (Code::BadRequest, StatusCode::BAD_REQUEST, "see /openapi.json for what can be asked"),
    (
        Code::Forbidden,
        StatusCode::FORBIDDEN,
        "ask as root, as the user that runs the daemon, or in the group that its settings name",
    ),
    (Code::NotFound, StatusCode::NOT_FOUND, "GET /v1/machines, or `plimsoll vm list`, shows those there are"),
    (Code::MethodNotAllowed, StatusCode::METHOD_NOT_ALLOWED, "see /openapi.json for what can be asked"),
    (Code::Conflict, StatusCode::CONFLICT, "nothing was changed"),
    (Code::TooLarge, StatusCode::PAYLOAD_TOO_LARGE, "send less"),
    (
        Code::UnsupportedMediaType,
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "send JSON, with the header `content-type: application/json`",
    ),
    (Code::Unprocessable, StatusCode::UNPROCESSABLE_ENTITY, "nothing was changed"),
    (Code::TooMany, StatusCode::TOO_MANY_REQUESTS, "wait a second and ask again"),
    (Code::Failed, StatusCode::INTERNAL_SERVER_ERROR, "the daemon's log says more"),
    (Code::Busy, StatusCode::SERVICE_UNAVAILABLE, "wait a second and ask again; nothing was changed"),
    (Code::Late, StatusCode::GATEWAY_TIMEOUT, "look before asking again: it is done, or still being done"),
];

impl Code {
    fn entry(self) -> (Self, StatusCode, &'static str) {
        CODES[self as usize]
    }
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fault {
    /// What kind of thing went wrong.
    pub code: Code,
    /// What was found, in a sentence.
    pub message: String,
    /// What to do.
    pub help: String,
}

impl Fault {
    /// With the help that goes with the code.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), help: code.entry().2.to_owned() }
    }

    /// A machine that was there is not any more.
    pub(crate) fn gone() -> Self {
        Self::new(Code::NotFound, "the machine has gone meanwhile")
    }

    /// With other help.
    #[must_use]
    pub fn help(self, help: impl Into<String>) -> Self {
        Self { help: help.into(), ..self }
    }

    /// Its status.
    pub(super) fn status(&self) -> StatusCode {
        self.code.entry().1
    }

    /// The answer as bytes, for a client whose request is not even read.
    pub(super) fn unread(&self) -> Vec<u8> {
        let body = serde_json::to_string(self).unwrap_or_default();
        let (status, length) = (self.status(), body.len());
        format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .into_bytes()
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { message, help, .. } = self;
        write!(f, "{message}; {help}")
    }
}

impl std::error::Error for Fault {}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let (status, code) = (self.status(), self.code);
        let mut response = (status, Json(self)).into_response();
        if matches!(code, Code::TooMany | Code::Busy) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl IntoResponses for Fault {
    /// Every request can end in any of them.
    fn responses() -> BTreeMap<String, RefOr<utoipa::openapi::Response>> {
        let schema = Ref::from_schema_name("Fault");
        let content = ContentBuilder::new().schema(Some(schema)).build();
        let response = |status: StatusCode| {
            let description = status.canonical_reason().unwrap_or_default();
            ResponseBuilder::new()
                .description(description)
                .content("application/json", content.clone())
                .build()
        };
        CODES.iter().map(|(_, status, _)| (status.as_str().to_owned(), response(*status).into())).collect()
    }
}

/// What a parser says without what it says each time.
fn tail(text: &str) -> String {
    let known = [
        "Failed to deserialize the JSON body into the target type: ",
        "Failed to parse the request body as JSON: ",
        "Failed to deserialize query string: ",
    ];
    known.into_iter().find_map(|start| text.strip_prefix(start)).unwrap_or(text).to_owned()
}

impl From<JsonRejection> for Fault {
    fn from(rejection: JsonRejection) -> Self {
        let code = match &rejection {
            JsonRejection::JsonDataError(_) => Code::Unprocessable,
            JsonRejection::MissingJsonContentType(_) => Code::UnsupportedMediaType,
            other if other.status() == StatusCode::PAYLOAD_TOO_LARGE => Code::TooLarge,
            _ => Code::BadRequest,
        };
        let text = tail(&rejection.body_text());
        Self::new(code, format!("the body makes no sense: {text}"))
    }
}

impl From<QueryRejection> for Fault {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(Code::BadRequest, format!("the query makes no sense: {}", tail(&rejection.body_text())))
    }
}

impl From<PathRejection> for Fault {
    fn from(rejection: PathRejection) -> Self {
        Self::new(Code::BadRequest, format!("the path makes no sense: {}", rejection.body_text()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_own_entry_and_status() {
        for (place, (code, status, help)) in CODES.iter().enumerate() {
            assert_eq!(*code as usize, place);
            assert!(!help.is_empty() && status.is_client_error() || status.is_server_error());
            assert_eq!(CODES.iter().filter(|(_, other, _)| other == status).count(), 1);
        }
    }
}
