/** Access tokens of Postern in Spring Security. The rest of the library does not need Spring. */
package dev.postern.client.spring;
