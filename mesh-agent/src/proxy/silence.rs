//! Who breaks the silence on a connection that is read for tokens alone, and on a port of which nothing is declared.
//!
//! Promises that a protocol in which the server speaks first is not held up, and that a client which waits does not get
//! around being read: however long it is silent, its first bytes are looked at unless the app has spoken before, and has not
//! spoken HTTP. Tested in the lab (`tests/tests/request_authentication.rs`).

use std::net::SocketAddr;

use tokio::{io::AsyncRead, net::TcpStream, time::timeout};

use super::{
    external::Approved,
    inbound::{self, Inbound},
    outbound::SERVER_FIRST_AFTER,
};
use crate::{
    detect::{self, Prefixed},
    error::{Error, Kind, Result},
};

/// How many bytes of a server's greeting tell HTTP from others.
const GREETING: usize = 16;

/// Who broke it.
pub(super) enum Broken {
    /// The client; what it has said is still to be read.
    ByClient,
    /// The app, by something else than HTTP; what it has said is still to be read.
    ByServer(TcpStream, Approved),
}

/// Waits for the first bytes.
pub(super) async fn broken<S>(inbound: &Inbound, client: &mut Prefixed<S>, app: SocketAddr) -> Result<Broken>
where
    S: AsyncRead + Unpin,
{
    if let Ok(spoken) = timeout(SERVER_FIRST_AFTER, detect::first_bytes(client)).await {
        return spoken.map(|()| Broken::ByClient).map_err(|error| gone(&error));
    }
    let (permit, approved) = inbound.may_pass(app, None).await?;
    let server = inbound::hand_over(inbound, &permit, app).await?;
    let mut greeting = [0; GREETING];
    let read = tokio::select! {
        biased;
        spoken = detect::first_bytes(client) => {
            return spoken.map(|()| Broken::ByClient).map_err(|error| gone(&error));
        }
        read = server.peek(&mut greeting) => read,
    };
    let read = read.map_err(|error| closed(app, &error))?;
    if read == 0 {
        return Err(Error::new(Kind::UpstreamReset, format!("{app} closed before anybody spoke")));
    }
    if !detect::may_be_http_server(&greeting[..read]) {
        return Ok(Broken::ByServer(server, approved));
    }
    // It is asked anew with the first request.
    drop(server);
    Ok(Broken::ByClient)
}

fn gone(error: &std::io::Error) -> Error {
    Error::new(Kind::DownstreamReset, format!("client went away: {error}"))
}

fn closed(app: SocketAddr, error: &std::io::Error) -> Error {
    Error::new(Kind::UpstreamReset, format!("{app} closed before anybody spoke: {error}"))
}
