//! Entries of the maps, many at once: what a predecessor left, what belongs to one pod, what is removed with it.
use std::{collections::HashMap, io};

use aya::maps::{self, MapData, MapError};
use marline_common::{Address, POD_REFUSED, PodEntry};

use super::{error::BpfError, load::Maps};
use crate::sys::netns::NetnsCookie;

/// A predecessor's listeners are gone, whatever its entries say.
pub(super) fn close_all(maps: &mut Maps) -> Result<(), BpfError> {
    let pods: Vec<_> = maps.pods.iter().collect::<Result<_, _>>().map_err(BpfError::map("PODS"))?;
    for (netns, entry) in pods {
        let entry = PodEntry { state: POD_REFUSED, ..entry };
        maps.pods.insert(netns, entry, 0).map_err(BpfError::map("PODS"))?;
    }
    let probes: Vec<_> = maps.probes.keys().collect::<Result<_, _>>().map_err(BpfError::map("PROBES"))?;
    for probe in probes {
        absent_is_fine(maps.probes.remove(&probe)).map_err(BpfError::map("PROBES"))?;
    }
    let clients: Vec<_> = maps.clients.keys().collect::<Result<_, _>>().map_err(BpfError::map("CLIENTS"))?;
    for client in clients {
        absent_is_fine(maps.clients.remove(&client)).map_err(BpfError::map("CLIENTS"))?;
    }
    forget_mapped(maps, None)
}

/// Whose an address is. All of it is known here as well, for one who looks for a pod's addresses in the kernel goes through those of all pods.
pub(super) struct Addresses {
    map: maps::HashMap<MapData, Address, NetnsCookie>,
    known: HashMap<Address, NetnsCookie>,
}

impl Addresses {
    /// With what a predecessor left. Nobody but the agent that has the pins changes it from there on.
    pub(super) fn new(map: maps::HashMap<MapData, Address, NetnsCookie>) -> Result<Self, BpfError> {
        let known = map.iter().collect::<Result<_, _>>().map_err(BpfError::map("ADDRESSES"))?;
        Ok(Self { map, known })
    }

    pub(super) fn owner(&self, address: &Address) -> Option<NetnsCookie> {
        self.known.get(address).copied()
    }

    pub(super) fn of(&self, netns: NetnsCookie) -> Vec<Address> {
        self.known.iter().filter(|(_, owner)| **owner == netns).map(|(address, _)| *address).collect()
    }

    pub(super) fn count(&self) -> u64 {
        self.known.len() as u64
    }

    pub(super) fn insert(&mut self, address: Address, netns: NetnsCookie) -> Result<(), BpfError> {
        self.map.insert(address, netns, 0).map_err(BpfError::map("ADDRESSES"))?;
        self.known.insert(address, netns);
        Ok(())
    }

    fn remove(&mut self, address: &Address) -> Result<(), BpfError> {
        absent_is_fine(self.map.remove(address)).map_err(BpfError::map("ADDRESSES"))?;
        self.known.remove(address);
        Ok(())
    }
}

pub(super) fn forget_address(maps: &mut Maps, address: &Address) -> Result<(), BpfError> {
    forget_listeners(maps, address)?;
    maps.addresses.remove(address)
}

pub(super) fn forget_listeners(maps: &mut Maps, address: &Address) -> Result<(), BpfError> {
    absent_is_fine(maps.listeners.remove(address)).map_err(BpfError::map("LISTENERS"))?;
    absent_is_fine(maps.listeners_mapped.remove(address)).map_err(BpfError::map("LISTENERS_MAPPED"))
}

/// Which ports of the pod, or of any, are on record for v4-mapped clients.
pub(super) fn forget_mapped(maps: &mut Maps, netns: Option<NetnsCookie>) -> Result<(), BpfError> {
    let ports: Vec<_> = maps.mapped_ports.keys().collect::<Result<_, _>>().map_err(BpfError::map("MAPPED_PORTS"))?;
    for port in ports.into_iter().filter(|port| netns.is_none_or(|netns| netns == port.netns)) {
        absent_is_fine(maps.mapped_ports.remove(&port)).map_err(BpfError::map("MAPPED_PORTS"))?;
    }
    Ok(())
}

/// Removing what is not there is done already.
pub(super) fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
