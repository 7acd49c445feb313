//! The bytes of an `.aql` file, as structs.
//!
//! Invariants
//! - All integers are little-endian, nothing is padded, every struct's size is asserted at compile time.
//! - `docs/formats/aql.md` holds tables generated from these structs; a test fails when they differ.
//!
//! Not here: what the numbers may be. Each `parse` beside the use of a struct checks that.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// First bytes of a file.
pub const MAGIC: [u8; 8] = crate::probe::AQL_MAGIC;
/// First bytes of each copy of the seal.
pub const SEAL_MAGIC: [u8; 8] = *b"AQLSEAL1";
/// First bytes of each frame.
pub const FRAME_MAGIC: [u8; 4] = *b"AQF1";
/// First bytes of a decoded root.
pub const ROOT_MAGIC: [u8; 4] = *b"AQLR";
/// First bytes of a decoded waymark.
pub const WAYMARK_MAGIC: [u8; 4] = *b"AQLW";

/// Version a reader must know to read anything.
pub const VERSION_MAJOR: u16 = 1;
/// Version that only adds what older readers may ignore.
pub const VERSION_MINOR: u16 = 0;

/// Superblock and each copy of the seal, in bytes.
pub const PAGE_BYTES: u64 = 4096;
/// The same, as the length of an array.
pub const PAGE_LEN: usize = 4096;
/// Where frames begin.
pub const FRAMES_START: u64 = PAGE_BYTES;
/// The frame header, in bytes; the payload follows at once.
pub const FRAME_HEADER_BYTES: usize = 64;
/// Bytes of [`Head`], as it says itself.
pub const HEAD_BYTES: u32 = 256;
/// Bytes of the frame header that the pointer-held checksum covers, after the payload.
pub const FRAME_IDENTITY_BYTES: usize = 56;

/// Blocks a leaf maps.
pub const LEAF_ENTRIES: usize = 256;
/// A leaf page (map or ids) in bytes.
pub const LEAF_BYTES: u32 = 4096;
/// Bytes between two places where a zstd frame may be cut off while decoding.
pub const FLUSH_BYTES: usize = 16 * 1024;

/// Smallest block, as a power of two.
pub const BLOCK_LOG2_MIN: u8 = 14;
/// Default block (64 KiB), as a power of two.
pub const BLOCK_LOG2_DEFAULT: u8 = 16;
/// Largest block (4 MiB), as a power of two.
pub const BLOCK_LOG2_MAX: u8 = 22;
/// Files one lineage may number: the width of the slot field.
pub const SLOTS_MAX: u16 = 4096;
/// Leaves of one disk; times 24 bytes this keeps the root below [`ROOT_BYTES_MAX`].
pub const LEAVES_MAX: u64 = 1 << 21;
/// Largest decoded root that is allocated for, in bytes.
pub const ROOT_BYTES_MAX: u32 = 64 << 20;
/// Largest decoded waymark that is allocated for, in bytes.
pub const WAYMARK_BYTES_MAX: u32 = 1 << 20;
/// Most leaves one waymark may name.
pub const WAYMARK_LEAVES_MAX: usize = 16 * 1024;
/// Longest hint (relative path) of an older file, in bytes.
pub const HINT_BYTES_MAX: usize = 1024;
/// Longest identity of a foreign file, in bytes.
pub const IDENTITY_BYTES_MAX: usize = 4096;

/// Incompatible feature: the layer table names foreign files.
pub const INCOMPAT_FOREIGN: u64 = 1 << 0;
/// Incompatible feature: blocks and leaves are encrypted.
pub const INCOMPAT_ENCRYPTED: u64 = 1 << 1;
/// Incompatible features this build reads.
pub const INCOMPAT_KNOWN: u64 = INCOMPAT_FOREIGN;

/// One field of a struct on disk, for the generated tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name in the struct.
    pub name: &'static str,
    /// Offset in the struct, in bytes.
    pub offset: usize,
    /// Size in bytes.
    pub size: usize,
    /// What it means: the field's documentation.
    pub about: &'static str,
}

macro_rules! on_disk {
    ($(#[doc = $doc:literal])* $name:ident, $size:expr, $fields:ident {
        $($(#[doc = $about:literal])* $field:ident: $type:ty,)*
    }) => {
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[doc = $about])* pub $field: $type,)* }

        const _: () = assert!(size_of::<$name>() == $size);

        #[doc = concat!("The fields of [`", stringify!($name), "`].")]
        pub const $fields: &[Field] = &[$(Field {
            name: stringify!($field),
            offset: std::mem::offset_of!($name, $field),
            size: size_of::<$type>(),
            about: concat!($($about),*),
        },)*];
    };
}

on_disk! {
    /// What identifies a layer. At offset 0 of the file, and again inside the seal, so that the loss of
    /// the first page costs nothing.
    Head, HEAD_BYTES as usize, HEAD_FIELDS {
        /// `89 41 51 4C 0D 0A 1A 0A`
        magic: [u8; 8],
        /// version a reader must know
        major: U16,
        /// version a reader may ignore
        minor: U16,
        /// bytes of this struct
        head_bytes: U32,
        /// features without which the file must not be read
        incompat: U64,
        /// features without which the file must not be resumed or salvaged
        ro_compat: U64,
        /// features that may be ignored
        compat: U64,
        /// this layer
        layer: [u8; 16],
        /// all layers that may refer to each other
        chain: [u8; 16],
        /// the layer this one was built on; zero for a full
        parent: [u8; 16],
        /// that layer's seal hash; zero for a full
        parent_seal: [u8; 32],
        /// bytes of the disk
        virtual_size: U64,
        /// random; repeated in every frame
        tag: U64,
        /// nanoseconds since 1970 by the writer's clock; for people, never for decisions
        created: U64,
        /// number of this file among those its disk draws from
        slot: U16,
        /// 1 full, 2 increment
        kind: u8,
        /// block size as a power of two, 14 to 22
        block_log2: u8,
        /// sector size of the disk as a power of two, 9 or 12
        sector_log2: u8,
        /// codec the writer preferred
        codec: u8,
        /// zero
        reserved: [u8; 2],
        /// which key made the content ids: BLAKE3 of the key, 16 bytes
        id_domain: [u8; 16],
        /// zero
        reserved_2: [u8; 88],
    }
}

on_disk! {
    /// Page 0 of the file.
    Superblock, 4096, SUPERBLOCK_FIELDS {
        /// what identifies the layer
        head: Head,
        /// zero
        reserved: [u8; 3808],
        /// BLAKE3 of the bytes before
        hash: [u8; 32],
    }
}

const _: () = assert!(PAGE_LEN as u64 == PAGE_BYTES && LEAF_ENTRIES * size_of::<EntryBytes>() == LEAF_BYTES as usize);

on_disk! {
    /// Before every payload. `check` is what pointers hold.
    FrameHeader, 64, FRAME_FIELDS {
        /// `AQF1`
        magic: [u8; 4],
        /// 1 block, 2 map leaf, 3 id page, 4 waymark, 5 root
        kind: u8,
        /// 0 raw, 1 lz4 block, 2 zstd frame
        codec: u8,
        /// zero
        flags: U16,
        /// block index, leaf index, or the copy number of a root
        logical: U64,
        /// decoded bytes of the payload
        raw_bytes: U32,
        /// stored bytes of the payload
        stored_bytes: U32,
        /// counts the frames of a file from 1
        sequence: U64,
        /// the layer's tag
        tag: U64,
        /// content id of a block; zero elsewhere
        id: [u8; 16],
        /// CRC-32C of the payload as stored, continued over bytes 0..56 of this header
        check: U32,
        /// CRC-32C of bytes 0..60 of this header
        header_check: U32,
    }
}

on_disk! {
    /// One block in a leaf page.
    EntryBytes, 16, ENTRY_FIELDS {
        /// `state:4, slot:12, offset:48`, from the high bits down; offset of the frame header
        place: U64,
        /// `stored bytes:24, codec:4, flags:4`, from the high bits down; flag 1: the frame was written for another block
        form: U32,
        /// the frame's `check`
        check: U32,
    }
}

on_disk! {
    /// One leaf in the root.
    LeafRefBytes, 24, LEAF_REF_FIELDS {
        /// place of the map leaf's frame, as in an entry; state 1 means 256 zero blocks and no pages
        map: U64,
        /// place of the id page's frame
        ids: U64,
        /// `check` of the map leaf's frame
        map_check: U32,
        /// `check` of the id page's frame
        ids_check: U32,
    }
}

on_disk! {
    /// Head of a decoded root; then the leaf references, then the layer records.
    RootHeader, 48, ROOT_FIELDS {
        /// `AQLR`
        magic: [u8; 4],
        /// leaf references that follow
        leaves: U32,
        /// layer records after them
        layers: U32,
        /// zero
        reserved: U32,
        /// blocks of this disk stored in this file
        own_blocks: U64,
        /// stored bytes of those, headers included
        own_bytes: U64,
        /// leaf and id pages of this disk stored in this file
        own_pages: U64,
        /// zero
        reserved_2: U64,
    }
}

on_disk! {
    /// One older file this layer draws from; its hint and identity follow at once.
    LayerRecordBytes, 104, LAYER_FIELDS {
        /// the file's layer
        layer: [u8; 16],
        /// its seal hash, or the digest of a foreign file's identity
        seal: [u8; 32],
        /// its tag
        tag: U64,
        /// where its frames end
        data_end: U64,
        /// size of its disk in bytes
        virtual_size: U64,
        /// blocks of this disk stored there
        live_blocks: U64,
        /// stored bytes of those, headers included
        live_bytes: U64,
        /// leaf and id pages of this disk stored there
        live_pages: U64,
        /// number of the file in the lineage
        slot: U16,
        /// 0 native, 1 foreign
        kind: u8,
        /// format of a foreign file: 1 qcow2, 2 raw, 3 vmdk, 4 vhdx, 5 vhd, 6 vbk, 7 pbs, 8 vdi, 9 ova, 10 vma, 11 virtnbdbackup, 12 xva, 13 xo, 14 longhorn, 15 benji, 255 any other
        foreign: u8,
        /// bytes of the hint: a relative path to look at first
        hint_bytes: U16,
        /// bytes of a foreign file's identity
        identity_bytes: U16,
    }
}

on_disk! {
    /// Head of a decoded waymark; the references of leaves changed since the one before follow.
    WaymarkHeader, 88, WAYMARK_FIELDS {
        /// `AQLW`
        magic: [u8; 4],
        /// changed leaves that follow
        leaves: U32,
        /// offset of the waymark before; 0 for none
        previous: U64,
        /// every block below this index was given to the writer before
        cursor: U64,
        /// what the writer has counted, as in the seal
        blocks_given: U64,
        /// of these, all zeros
        blocks_zero: U64,
        /// of these, equal to the parent
        blocks_unchanged: U64,
        /// of these, already stored in the chain
        blocks_shared: U64,
        /// of these, written to this file
        blocks_written: U64,
        /// blocks taken over from older files
        blocks_moved: U64,
        /// decoded bytes written to this file
        bytes_raw: U64,
        /// stored bytes of those, headers included
        bytes_stored: U64,
    }
}

on_disk! {
    /// One changed leaf in a waymark.
    WaymarkLeaf, 32, WAYMARK_LEAF_FIELDS {
        /// leaf index
        leaf: U64,
        /// where it is now
        at: LeafRefBytes,
    }
}

on_disk! {
    /// Each copy of the seal. The seal hash is computed with `copy` as zero, so both copies share it.
    SealPage, 4096, SEAL_FIELDS {
        /// `AQLSEAL1`
        magic: [u8; 8],
        /// 0 at EOF - 8192, 1 at EOF - 4096
        copy: U32,
        /// codec of the root frames
        root_codec: u8,
        /// zero
        reserved: [u8; 3],
        /// length of the whole file
        file_bytes: U64,
        /// where the frames end; zeros fill up to the first seal
        data_end: U64,
        /// last sequence number used
        sequence: U64,
        /// offset of the first root frame
        root_a: U64,
        /// offset of its copy
        root_b: U64,
        /// stored bytes of a root
        root_stored: U32,
        /// decoded bytes of a root
        root_raw: U32,
        /// BLAKE3 of the decoded root
        root_hash: [u8; 32],
        /// offset of the last waymark; 0 for none
        waymark: U64,
        /// blocks given to the writer
        blocks_given: U64,
        /// of these, all zeros
        blocks_zero: U64,
        /// of these, equal to the parent
        blocks_unchanged: U64,
        /// of these, already stored in the chain
        blocks_shared: U64,
        /// of these, written to this file
        blocks_written: U64,
        /// blocks taken over from older files, so that those are no longer needed
        blocks_moved: U64,
        /// decoded bytes written to this file
        bytes_raw: U64,
        /// stored bytes of those, headers included
        bytes_stored: U64,
        /// blocks of the whole disk that hold data
        data_blocks: U64,
        /// the superblock's head again
        head: Head,
        /// zero
        reserved_2: [u8; 3632],
        /// BLAKE3 of the bytes before, with `copy` as zero: the seal hash
        hash: [u8; 32],
    }
}

/// Where the seal hash's input ends in a page.
pub const HASHED_BYTES: usize = 4096 - 32;

/// Name and fields of every struct, in the order of the document.
pub const STRUCTS: &[(&str, usize, &[Field])] = &[
    ("Superblock", size_of::<Superblock>(), SUPERBLOCK_FIELDS),
    ("Head", size_of::<Head>(), HEAD_FIELDS),
    ("FrameHeader", size_of::<FrameHeader>(), FRAME_FIELDS),
    ("EntryBytes", size_of::<EntryBytes>(), ENTRY_FIELDS),
    ("LeafRefBytes", size_of::<LeafRefBytes>(), LEAF_REF_FIELDS),
    ("RootHeader", size_of::<RootHeader>(), ROOT_FIELDS),
    ("LayerRecordBytes", size_of::<LayerRecordBytes>(), LAYER_FIELDS),
    ("WaymarkHeader", size_of::<WaymarkHeader>(), WAYMARK_FIELDS),
    ("WaymarkLeaf", size_of::<WaymarkLeaf>(), WAYMARK_LEAF_FIELDS),
    ("SealPage", size_of::<SealPage>(), SEAL_FIELDS),
];
