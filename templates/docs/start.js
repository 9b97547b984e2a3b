// Shows the description of the API. No validator: the page calls nothing but its own server.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#api", deepLinking: true, docExpansion: "list", validatorUrl: null });
