//! Why a token is not believed, in the words that Envoy's filter for tokens has for it.

/// Why a token is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenFailure {
    /// Not three parts with two dots between them.
    Form,
    /// The first part is not base64url.
    HeaderBase64,
    /// The first part is not a JSON object.
    HeaderJson,
    /// It names no algorithm.
    NoAlgorithm,
    /// Its algorithm is none of those that a public key checks, or it asks for what is not understood (`crit`).
    Algorithm,
    /// Its `kid` is no text.
    KeyId,
    /// The second part is not base64url.
    PayloadBase64,
    /// The second part is not a JSON object.
    PayloadJson,
    /// `iss` is no text.
    IssuerType,
    /// `sub` is no text.
    SubjectType,
    /// `aud` is neither a text nor a list of texts.
    AudienceType,
    /// `exp` is no number of seconds.
    ExpiryType,
    /// `nbf` is no number of seconds.
    NotBeforeType,
    /// The third part is not base64url.
    SignatureBase64,
    /// `exp` is in the past.
    Expired,
    /// `nbf` is in the future.
    NotYetValid,
    /// No rule is about its issuer at the place where it is.
    Issuer,
    /// It is for other audiences.
    Audience,
    /// The issuer's keys have not been fetched.
    NoKeys,
    /// None of the issuer's keys has its `kid` and fits its `alg`.
    NoMatchingKey,
    /// Signed with none of the keys that fit.
    Signature,
    /// There are more tokens in the request than are looked at.
    TooMany,
}

impl TokenFailure {
    /// What the client is told.
    pub const fn told(self) -> &'static str {
        match self {
            Self::Form => "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            Self::HeaderBase64 => "Jwt header is an invalid Base64url encoded",
            Self::HeaderJson => "Jwt header is an invalid JSON",
            Self::NoAlgorithm => "Jwt header [alg] field is required and must be a string",
            Self::Algorithm => "Jwt header [alg] is not supported",
            Self::KeyId => "Jwt header [kid] field is not a string",
            Self::PayloadBase64 => "Jwt payload is an invalid Base64url encoded",
            Self::PayloadJson => "Jwt payload is an invalid JSON",
            Self::IssuerType => "Jwt payload [iss] field is not a string",
            Self::SubjectType => "Jwt payload [sub] field is not a string",
            Self::AudienceType => "Jwt payload [aud] field is not a string or string list",
            Self::ExpiryType => "Jwt payload [exp] field is not a positive integer",
            Self::NotBeforeType => "Jwt payload [nbf] field is not a positive integer",
            Self::SignatureBase64 => "Jwt signature is an invalid Base64url encoded",
            Self::Expired => "Jwt is expired",
            Self::NotYetValid => "Jwt not yet valid",
            Self::Issuer => "Jwt issuer is not configured",
            Self::Audience => "Audiences in Jwt are not allowed",
            Self::NoKeys => "Jwks remote fetch is failed",
            Self::NoMatchingKey => "Jwks doesn't have key to match kid or alg from Jwt",
            Self::Signature => "Jwt verification fails",
            Self::TooMany => "Too many Jwts in one request",
        }
    }
}
