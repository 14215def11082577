//! Who certifies the pods of a node: the embedded authority, one reached over the network, or SPIRE.

use std::path::PathBuf;

use clap::Args;

/// The flags; at most one authority is named.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Certificate authority")]
pub struct CaFlags {
    /// Certificate authority to ask, instead of the embedded one: any that speaks Istio's certificate service, such as
    /// `mesh-agent controller` or istiod
    #[arg(long, env = "MESH_CA_ADDRESS", value_name = "HOST:PORT", requires_all = ["ca_root", "ca_token"], conflicts_with = "ca",
          value_parser = host_and_port)]
    pub ca_address: Option<String>,
    /// PEM certificates that the authority's server certificate has to chain to; the mesh's roots too, where the authority
    /// does not send them
    #[arg(long, env = "MESH_CA_ROOT", value_name = "FILE", requires = "ca_address")]
    pub ca_root: Option<PathBuf>,
    /// Token that shows the authority who this agent is, read again each time it is used (`mesh-agent token`, or a projected
    /// service account token)
    #[arg(long, env = "MESH_CA_TOKEN", value_name = "FILE", requires = "ca_address")]
    pub ca_token: Option<PathBuf>,
    /// Name that the authority's server certificate has to have [default: HOST of `--ca-address`]
    #[arg(long, env = "MESH_CA_SERVER_NAME", value_name = "NAME", requires = "ca_address")]
    pub ca_server_name: Option<String>,
    /// Take the certificates from a SPIFFE Workload API (SPIRE's agent): `spiffe:UNIX_SOCKET`
    #[arg(long, env = "MESH_CA", value_name = "SOURCE", value_parser = workload_api)]
    pub ca: Option<PathBuf>,
}

/// Where certificates come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CaSource {
    /// The authority in this process, kept in the state directory.
    Embedded,
    /// An authority that is asked over the network.
    Remote {
        /// Its `HOST:PORT`.
        address: String,
        /// The name its certificate has to have.
        server_name: String,
        /// PEM file of roots.
        roots: PathBuf,
        /// Token file.
        token: PathBuf,
    },
    /// A SPIFFE Workload API at this socket.
    Spiffe(PathBuf),
}

impl CaFlags {
    /// What the flags say.
    pub fn source(&self) -> CaSource {
        match (&self.ca, &self.ca_address, &self.ca_root, &self.ca_token) {
            (Some(socket), ..) => CaSource::Spiffe(socket.clone()),
            (None, Some(address), Some(roots), Some(token)) => CaSource::Remote {
                address: address.clone(),
                server_name: self.ca_server_name.clone().unwrap_or_else(|| host(address).to_owned()),
                roots: roots.clone(),
                token: token.clone(),
            },
            _ => CaSource::Embedded,
        }
    }
}

/// The host of a checked `HOST:PORT`, without the brackets of an IPv6 address.
fn host(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

fn host_and_port(text: &str) -> Result<String, String> {
    let wrong = || format!("{text:?} is not HOST:PORT (an IPv6 address goes in brackets)");
    let (name, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let bracketed = name.starts_with('[') && name.ends_with(']');
    let port = port.parse::<u16>().is_ok_and(|port| port != 0);
    if name.is_empty() || !port || (name.contains(':') && !bracketed) {
        return Err(wrong());
    }
    Ok(text.to_owned())
}

fn workload_api(text: &str) -> Result<PathBuf, String> {
    // `unix://` as in SPIFFE_ENDPOINT_SOCKET.
    let socket = text.strip_prefix("spiffe:").map(|path| path.strip_prefix("unix://").unwrap_or(path));
    match socket {
        Some(path) if path.starts_with('/') => Ok(PathBuf::from(path)),
        _ => Err(format!("{text:?} is not spiffe:UNIX_SOCKET with an absolute path")),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Flags {
        #[command(flatten)]
        ca: CaFlags,
    }

    fn parse(flags: &[&str]) -> Result<CaSource, clap::Error> {
        Flags::try_parse_from([&["mesh-agent"], flags].concat()).map(|flags| flags.ca.source())
    }

    #[test]
    fn the_flags_name_one_authority_and_all_it_takes() {
        assert_eq!(parse(&[]).unwrap(), CaSource::Embedded);
        let files = ["--ca-root=/r.pem", "--ca-token=/t"];
        for (address, name) in
            [("ca.mesh:15012", "ca.mesh"), ("10.0.0.1:1", "10.0.0.1"), ("[::1]:15012", "::1")]
        {
            let CaSource::Remote { address: to, server_name, .. } =
                parse(&["--ca-address", address, files[0], files[1]]).unwrap()
            else {
                unreachable!("an address is given")
            };
            assert_eq!((to.as_str(), server_name.as_str()), (address, name));
        }
        assert_eq!(parse(&["--ca=spiffe:/run/s.sock"]).unwrap(), CaSource::Spiffe("/run/s.sock".into()));
        assert_eq!(parse(&["--ca=spiffe:unix:///run/s"]).unwrap(), CaSource::Spiffe("/run/s".into()));
        for bad in [
            &["--ca-address=ca:15012"][..],
            &["--ca-address=ca:15012", "--ca-root=/r.pem"],
            &["--ca-root=/r.pem"],
            &["--ca-token=/t"],
            &["--ca-address=ca", files[0], files[1]],
            &["--ca-address=::1:15012", files[0], files[1]],
            &["--ca-address=:15012", files[0], files[1]],
            &["--ca-address=ca:0", files[0], files[1]],
            &["--ca=spiffe:/s", "--ca-address=ca:15012", files[0], files[1]],
            &["--ca=spiffe:"],
            &["--ca=spire:/s"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
