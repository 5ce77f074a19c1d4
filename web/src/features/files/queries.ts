import { api } from '@/lib/api';
import { file, list } from '@/types/api';
import { queryOptions } from '@tanstack/react-query';

export type Purpose = 'fine-tune' | 'batch';

export const filesQuery = (purpose: Purpose) =>
  queryOptions({
    queryKey: ['files', purpose],
    queryFn: async ({ signal }) => (await api.get(`/v1/files?purpose=${purpose}&limit=100`, list(file), signal)).data,
  });

export const fileQuery = (id: string) =>
  queryOptions({
    queryKey: ['files', id],
    queryFn: ({ signal }) => api.get(`/v1/files/${id}`, file, signal),
    retry: false,
  });

export const deleteFile = (id: string): Promise<void> => api.delete(`/v1/files/${id}`);
