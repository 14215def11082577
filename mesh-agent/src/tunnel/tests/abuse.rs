//! Peers that are who they say, and then break the protocol.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use super::*;
use crate::identity::server_name;

/// What serving says after a peer with a good certificate sent these bytes.
async fn after(
    bytes: &[u8],
    alpn: &[u8],
) -> std::result::Result<Result<()>, Box<dyn std::error::Error + Send + Sync>> {
    let pair = Pair::new().await?;
    let mut node = Node::start(&pair.server, 1, echo).await?;
    let config = pair.client.client_config(std::slice::from_ref(&pair.server.id), &[alpn])?;
    let mut tls = TlsConnector::from(config).connect(server_name(POD), node.dial().await?).await?;
    tls.write_all(bytes).await?;
    tls.shutdown().await?;
    let _ = tls.read_to_end(&mut Vec::new()).await;
    Ok(node.served.join_next().await.ok_or("nothing was served")??)
}

#[tokio::test]
async fn garbage_instead_of_http2_ends_that_connection_alone() -> TestResult {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    // A HEADERS frame on stream 0 after empty SETTINGS; a DATA frame on a stream that was never opened.
    let headers_on_zero =
        [PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0], &[0, 0, 1, 1, 4, 0, 0, 0, 0, 0x82]].concat();
    let data_on_idle = [PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0], &[0, 0, 1, 0, 0, 0, 0, 0, 7, 0]].concat();
    for alpn in [crate::identity::ALPN_H2, crate::identity::ALPN_MESH_H2] {
        for bytes in
            [&b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..], &[0xff; 4096], &headers_on_zero, &data_on_idle]
        {
            let outcome = after(bytes, alpn).await?;
            assert!(outcome.is_err(), "{:?} was served", bytes.get(..16));
        }
    }
    Ok(())
}
