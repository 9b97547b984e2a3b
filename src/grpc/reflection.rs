//! gRPC reflection, as `reflection.proto` has it: what is not found is an `error_response`, and the stream goes on.
//! tonic-reflection ends the stream there, and knows no extensions. Only its generated types are used.

use std::{collections::HashMap, pin::Pin, sync::Arc};

use axum::extract::Request as HttpRequest;
use http::Uri;
use prost::Message as _;
use prost_reflect::{DescriptorPool, FileDescriptor, prost_types::FileDescriptorSet};
use tonic::{
    Code, Request, Response, Status, Streaming,
    codegen::tokio_stream::{Stream, StreamExt as _},
};
use tonic_reflection::pb::{
    v1::{
        self, ErrorResponse, ExtensionNumberResponse, FileDescriptorResponse, ListServiceResponse,
        ServerReflectionRequest, ServerReflectionResponse, ServiceResponse,
        server_reflection_request::MessageRequest,
        server_reflection_response::MessageResponse,
        server_reflection_server::{ServerReflection, ServerReflectionServer},
    },
    v1alpha,
};

use crate::{error::Error, proto};

use super::limits::MAX_REFLECTION;

/// The path of the RPC in the version before v1. Its messages are those of v1 in another package.
pub const V1ALPHA: &str = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
const V1: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// The contract, and the types of the details of its errors, so that generic clients can print them.
pub fn contract() -> Result<DescriptorPool, Error> {
    let mut pool = DescriptorPool::decode(proto::CONTRACT).map_err(Error::internal)?;
    // Their `google.rpc.Status` is in a file without the name that it was published under, and no message of the contract has it.
    let mut details = FileDescriptorSet::decode(tonic_types::pb::FILE_DESCRIPTOR_SET).map_err(Error::internal)?;
    details.file.retain(|file| file.name() != "status.proto");
    pool.add_file_descriptor_set(details).map_err(Error::internal)?;
    Ok(pool)
}

/// The service that describes everything that is served.
pub fn server() -> Result<ServerReflectionServer<impl ServerReflection>, Error> {
    let mut pool = contract()?;
    for served in [
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        v1::FILE_DESCRIPTOR_SET,
        v1alpha::FILE_DESCRIPTOR_SET,
        proto::external::DESCRIPTORS,
    ] {
        pool.decode_file_descriptor_set(served).map_err(Error::internal)?;
    }
    Ok(ServerReflectionServer::new(Reflection(Arc::new(Symbols::of(pool)))))
}

/// Turns a call of the older version into one of v1.
pub fn to_v1(mut request: HttpRequest) -> HttpRequest {
    *request.uri_mut() = Uri::from_static(V1);
    request
}

struct Reflection(Arc<Symbols>);

#[tonic::async_trait]
impl ServerReflection for Reflection {
    type ServerReflectionInfoStream = Pin<Box<dyn Stream<Item = Result<ServerReflectionResponse, Status>> + Send>>;

    async fn server_reflection_info(
        &self,
        request: Request<Streaming<ServerReflectionRequest>>,
    ) -> Result<Response<Self::ServerReflectionInfoStream>, Status> {
        let symbols = Arc::clone(&self.0);
        let answers = request.into_inner().map(move |question| match question {
            Ok(question) => Ok(symbols.respond(question)),
            // The body was longer than one of a stream may be.
            Err(fault) if fault.code() == Code::Unknown => Err(Status::resource_exhausted(format!(
                "the questions of this stream are larger than {MAX_REFLECTION} bytes: begin another one"
            ))),
            Err(fault) => Err(fault),
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

/// The files that are served, by the symbols in them.
struct Symbols {
    pool: DescriptorPool,
    files: HashMap<String, FileDescriptor>,
}

impl Symbols {
    fn of(pool: DescriptorPool) -> Self {
        let mut files = HashMap::new();
        let mut add = |name: &str, file: FileDescriptor| files.insert(name.to_owned(), file);
        for message in pool.all_messages() {
            add(message.full_name(), message.parent_file());
            message.fields().for_each(|field| _ = add(field.full_name(), message.parent_file()));
            message.oneofs().for_each(|oneof| _ = add(oneof.full_name(), message.parent_file()));
        }
        for values in pool.all_enums() {
            add(values.full_name(), values.parent_file());
            values.values().for_each(|value| _ = add(value.full_name(), values.parent_file()));
        }
        for extension in pool.all_extensions() {
            add(extension.full_name(), extension.parent_file());
        }
        for service in pool.services() {
            add(service.full_name(), service.parent_file());
            service.methods().for_each(|method| _ = add(method.full_name(), service.parent_file()));
        }
        Self { pool, files }
    }

    fn respond(&self, question: ServerReflectionRequest) -> ServerReflectionResponse {
        let answer = self.answer(question.message_request.as_ref()).unwrap_or_else(|(code, error_message)| {
            MessageResponse::ErrorResponse(ErrorResponse { error_code: code.into(), error_message })
        });
        ServerReflectionResponse {
            valid_host: question.host.clone(),
            original_request: Some(question),
            message_response: Some(answer),
        }
    }

    fn answer(&self, question: Option<&MessageRequest>) -> Result<MessageResponse, (Code, String)> {
        let not_found = |what: &str, name: &str| (Code::NotFound, format!("there is no {what} {name}"));
        let message = |name: &str| self.pool.get_message_by_name(name).ok_or_else(|| not_found("message", name));
        match question {
            None => Err((Code::InvalidArgument, "the question is empty".to_owned())),
            Some(MessageRequest::FileByFilename(name)) => {
                self.pool.get_file_by_name(name).map(|found| file(&found)).ok_or_else(|| not_found("file", name))
            }
            Some(MessageRequest::FileContainingSymbol(name)) => {
                self.files.get(name.as_str()).map(file).ok_or_else(|| not_found("symbol", name))
            }
            Some(MessageRequest::FileContainingExtension(wanted)) => {
                let number = u32::try_from(wanted.extension_number).unwrap_or_default();
                let extension = message(&wanted.containing_type)?.get_extension(number);
                let name = format!("{number} of {}", wanted.containing_type);
                extension.map(|found| file(&found.parent_file())).ok_or_else(|| not_found("extension", &name))
            }
            Some(MessageRequest::AllExtensionNumbersOfType(name)) => {
                let extended = message(name)?;
                let numbers = extended.extensions().map(|extension| extension.number());
                let extension_number = numbers.filter_map(|number| i32::try_from(number).ok()).collect();
                let base_type_name = name.clone();
                let numbers = ExtensionNumberResponse { base_type_name, extension_number };
                Ok(MessageResponse::AllExtensionNumbersResponse(numbers))
            }
            Some(MessageRequest::ListServices(_)) => {
                let service =
                    self.pool.services().map(|service| ServiceResponse { name: service.full_name().to_owned() });
                Ok(MessageResponse::ListServicesResponse(ListServiceResponse { service: service.collect() }))
            }
        }
    }
}

fn file(found: &FileDescriptor) -> MessageResponse {
    MessageResponse::FileDescriptorResponse(FileDescriptorResponse {
        file_descriptor_proto: vec![found.encode_to_vec()],
    })
}
