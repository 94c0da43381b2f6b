//! The fields of what parquet files write in Thrift, by their numbers, as the format's `parquet.thrift` has them.
//!
//! Only those that the library reads by number alone; it passes over the others by the type that the file gives them.

use super::compact::{BINARY, BYTE, DOUBLE, I16, I32, I64, LIST, STRUCT, TRUE};

/// A value's type.
#[derive(Debug, Clone, Copy)]
pub enum Type {
    /// Without values inside, by its number in the compact protocol.
    Plain(u8),
    /// Elements of one type.
    List(&'static Type),
    /// Fields by number; a union is one of those.
    Struct(Fields),
}

/// The known fields of a struct.
pub type Fields = &'static [(i64, Type)];

impl Type {
    /// Its number in the compact protocol; a boolean's is that of `true`.
    pub fn code(self) -> u8 {
        match self {
            Self::Plain(code) => code,
            Self::List(_) => LIST,
            Self::Struct(_) => STRUCT,
        }
    }
}

/// The type of a field; `None` for one that is not known.
pub fn field(of: Fields, id: i64) -> Option<Type> {
    of.iter().find(|(known, _)| *known == id).map(|(_, kind)| *kind)
}

const BOOLEAN: Type = Type::Plain(TRUE);
const INT8: Type = Type::Plain(BYTE);
const INT16: Type = Type::Plain(I16);
const INT32: Type = Type::Plain(I32);
const INT64: Type = Type::Plain(I64);
const FLOAT: Type = Type::Plain(DOUBLE);
const BYTES: Type = Type::Plain(BINARY);
const EMPTY: Type = Type::Struct(&[]);

/// `FileMetaData.schema`, whose elements are [`ELEMENT`].
pub const SCHEMA: i64 = 2;
/// `FileMetaData`.
pub const FILE: Fields = &[
    (1, INT32),
    (SCHEMA, Type::List(&Type::Struct(ELEMENT))),
    (3, INT64),
    (4, Type::List(&Type::Struct(ROW_GROUP))),
    (5, Type::List(&Type::Struct(KEY_VALUE))),
    (6, BYTES),
    (7, Type::List(&Type::Struct(&[(1, EMPTY)]))),
    (8, EMPTY),
    (9, BYTES),
];

/// `SchemaElement.num_children`.
pub const CHILDREN: i64 = 5;
/// `SchemaElement`.
pub const ELEMENT: Fields = &[
    (1, INT32),
    (2, INT32),
    (3, INT32),
    (4, BYTES),
    (CHILDREN, INT32),
    (6, INT32),
    (7, INT32),
    (8, INT32),
    (9, INT32),
    (10, Type::Struct(LOGICAL)),
];

/// `LogicalType`.
const LOGICAL: Fields = &[
    (1, EMPTY),
    (2, EMPTY),
    (3, EMPTY),
    (4, EMPTY),
    (5, Type::Struct(&[(1, INT32), (2, INT32)])),
    (6, EMPTY),
    (7, TIME),
    (8, TIME),
    (10, Type::Struct(&[(1, INT8), (2, BOOLEAN)])),
    (11, EMPTY),
    (12, EMPTY),
    (13, EMPTY),
    (14, EMPTY),
    (15, EMPTY),
    (16, Type::Struct(&[(1, INT8)])),
    (17, Type::Struct(&[(1, BYTES)])),
    (18, Type::Struct(&[(1, BYTES), (2, INT32)])),
];
const TIME: Type = Type::Struct(&[(1, BOOLEAN), (2, Type::Struct(&[(1, EMPTY), (2, EMPTY), (3, EMPTY)]))]);

const KEY_VALUE: Fields = &[(1, BYTES), (2, BYTES)];

/// `RowGroup`.
const ROW_GROUP: Fields = &[
    (1, Type::List(&Type::Struct(CHUNK))),
    (2, INT64),
    (3, INT64),
    (4, Type::List(&Type::Struct(&[(1, INT32), (2, BOOLEAN), (3, BOOLEAN)]))),
    (5, INT64),
    (6, INT64),
    (7, INT16),
];

/// `ColumnChunk`.
const CHUNK: Fields = &[
    (1, BYTES),
    (2, INT64),
    (3, Type::Struct(COLUMN)),
    (4, INT64),
    (5, INT32),
    (6, INT64),
    (7, INT32),
    (8, EMPTY),
    (9, BYTES),
];

/// `ColumnMetaData`.
const COLUMN: Fields = &[
    (1, INT32),
    (2, Type::List(&INT32)),
    (3, Type::List(&BYTES)),
    (4, INT32),
    (5, INT64),
    (6, INT64),
    (7, INT64),
    (8, Type::List(&Type::Struct(KEY_VALUE))),
    (9, INT64),
    (10, INT64),
    (11, INT64),
    (12, Type::Struct(STATISTICS)),
    (13, Type::List(&Type::Struct(&[(1, INT32), (2, INT32), (3, INT32)]))),
    (14, INT64),
    (15, INT32),
    (16, Type::Struct(&[(1, INT64), (2, Type::List(&INT64)), (3, Type::List(&INT64))])),
    (17, Type::Struct(&[(1, Type::Struct(BOX)), (2, Type::List(&INT32))])),
];

/// `Statistics`.
const STATISTICS: Fields = &[
    (1, BYTES),
    (2, BYTES),
    (3, INT64),
    (4, INT64),
    (5, BYTES),
    (6, BYTES),
    (7, BOOLEAN),
    (8, BOOLEAN),
    (9, INT64),
];

/// `BoundingBox`.
const BOX: Fields =
    &[(1, FLOAT), (2, FLOAT), (3, FLOAT), (4, FLOAT), (5, FLOAT), (6, FLOAT), (7, FLOAT), (8, FLOAT)];

/// `PageHeader.type`.
pub const TYPE: i64 = 1;
/// `PageHeader.compressed_page_size`.
pub const SIZE: i64 = 3;
/// `PageHeader.data_page_header`.
pub const DATA: i64 = 5;
/// `PageHeader.dictionary_page_header`.
pub const DICTIONARY: i64 = 7;
/// `PageHeader.data_page_header_v2`.
pub const DATA_V2: i64 = 8;
/// `PageHeader`.
pub const HEADER: Fields = &[
    (TYPE, INT32),
    (2, INT32),
    (SIZE, INT32),
    (4, INT32),
    (DATA, Type::Struct(&[(1, INT32), (2, INT32), (3, INT32), (4, INT32), (5, Type::Struct(STATISTICS))])),
    (6, EMPTY),
    (DICTIONARY, Type::Struct(&[(1, INT32), (2, INT32), (3, BOOLEAN)])),
    (
        DATA_V2,
        Type::Struct(&[
            (1, INT32),
            (2, INT32),
            (3, INT32),
            (4, INT32),
            (5, INT32),
            (6, INT32),
            (7, BOOLEAN),
            (8, Type::Struct(STATISTICS)),
        ]),
    ),
];
