/** The only place that speaks HTTP. Every request carries the header without which the session's cookie counts for nothing. */
import { z } from 'zod';

export const PAGE_HEADER = { 'x-imfine-page': '1' } as const;

/** What went wrong, in the API's own words. `code` is stable and is what the page translates. */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly code: string,
    readonly param: string | null = null,
  ) {
    super(message);
    this.name = 'ApiError';
  }
}

const errorBody = z.object({
  error: z.object({
    message: z.string(),
    code: z.string().nullish(),
    type: z.string().nullish(),
    param: z.string().nullish(),
  }),
});

export function errorFrom(status: number, body: unknown): ApiError {
  const parsed = errorBody.safeParse(body);
  if (!parsed.success) return new ApiError(`HTTP ${status}`, status, status >= 500 ? 'internal_error' : 'bad_answer');
  const { message, code, type, param } = parsed.data.error;
  return new ApiError(message, status, code ?? type ?? 'unknown', param ?? null);
}

/** Calls back when the session has ended, wherever that was noticed. */
let onSignedOut: () => void = () => undefined;
export function whenSignedOut(callback: () => void): void {
  onSignedOut = callback;
}

async function send(method: string, path: string, init: RequestInit = {}): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, {
      ...init,
      method,
      credentials: 'same-origin',
      headers: { ...PAGE_HEADER, ...(init.headers as Record<string, string> | undefined) },
    });
  } catch (cause) {
    if (cause instanceof DOMException && cause.name === 'AbortError') throw cause;
    throw new ApiError('The relay did not answer.', 0, 'network');
  }
  if (response.ok) return response;
  throw refused(path, response.status, await response.json().catch(() => null));
}

function refused(path: string, status: number, body: unknown): ApiError {
  if (status === 401 && path !== '/api/session' && path !== '/api/me') onSignedOut();
  return errorFrom(status, body);
}

async function read<T extends z.ZodType>(response: Response, shape: T): Promise<z.infer<T>> {
  const parsed = shape.safeParse(await response.json().catch(() => null));
  if (parsed.success) return parsed.data;
  throw new ApiError(z.prettifyError(parsed.error), response.status, 'bad_answer');
}

const json = (body: unknown): RequestInit => ({
  body: JSON.stringify(body),
  headers: { 'content-type': 'application/json' },
});

export const api = {
  get: async <T extends z.ZodType>(path: string, shape: T, signal?: AbortSignal) =>
    read(await send('GET', path, signal ? { signal } : {}), shape),
  post: async <T extends z.ZodType>(path: string, body: unknown, shape: T, signal?: AbortSignal) =>
    read(await send('POST', path, { ...json(body), ...(signal ? { signal } : {}) }), shape),
  put: async <T extends z.ZodType>(path: string, body: unknown, shape: T) =>
    read(await send('PUT', path, json(body)), shape),
  delete: async (path: string, body?: unknown) => {
    await send('DELETE', path, body === undefined ? {} : json(body));
  },
  /** The body of a stream of server-sent events. `body` undefined: picks one up. */
  stream: async (path: string, body: unknown, signal: AbortSignal, lastEventId?: string) => {
    const init: RequestInit = body === undefined ? {} : json(body);
    const headers = {
      ...(init.headers as Record<string, string> | undefined),
      accept: 'text/event-stream',
      ...(lastEventId ? { 'last-event-id': lastEventId } : undefined),
    };
    const response = await send(body === undefined ? 'GET' : 'POST', path, { ...init, headers, signal });
    if (!response.body) throw new ApiError('The relay sent nothing.', response.status, 'bad_answer');
    return response.body;
  },
};

/** A file for the user's disk. A plain link would not carry the header without which the session counts for nothing. */
export async function download(path: string, name: string): Promise<void> {
  const url = URL.createObjectURL(await (await send('GET', path)).blob());
  const link = document.createElement('a');
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser reads it after the click
}

/** XMLHttpRequest, for fetch can't say how much of a body has been sent. */
export function upload<T extends z.ZodType>(
  path: string,
  form: FormData,
  shape: T,
  onProgress: (share: number) => void,
  signal?: AbortSignal,
): Promise<z.infer<T>> {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open('POST', path);
    for (const [name, value] of Object.entries(PAGE_HEADER)) request.setRequestHeader(name, value);
    request.responseType = 'json';
    request.upload.onprogress = (event) => {
      if (event.lengthComputable) onProgress(event.loaded / event.total);
    };
    request.onerror = () => reject(new ApiError('The relay did not answer.', 0, 'network'));
    request.onabort = () => reject(new DOMException('aborted', 'AbortError'));
    request.onload = () => {
      if (request.status >= 400) {
        reject(refused(path, request.status, request.response));
        return;
      }
      const parsed = shape.safeParse(request.response);
      if (parsed.success) resolve(parsed.data);
      else reject(new ApiError(z.prettifyError(parsed.error), request.status, 'bad_answer'));
    };
    signal?.addEventListener('abort', () => request.abort());
    request.send(form);
  });
}
