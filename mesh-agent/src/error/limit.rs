//! What there may be so many of, by the `connectionPool` of a destination.

/// What a `connectionPool` limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Limit {
    /// `tcp.maxConnections`.
    Connections,
    /// `http.http1MaxPendingRequests`.
    Pending,
    /// `http.http2MaxRequests`.
    Requests,
}

impl Limit {
    /// The word in metric labels.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Pending => "pending_requests",
            Self::Requests => "requests",
        }
    }

    /// What they are called in sentences.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Pending => "waiting requests",
            Self::Requests => "requests under way",
        }
    }
}
