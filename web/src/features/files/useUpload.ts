/** A file on its way to the relay, which checks it before it keeps it. */
import { upload } from '@/lib/api';
import { file, type DataFile } from '@/types/api';
import { useMutation, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { filesQuery, type Purpose } from './queries';

export function useUpload(purpose: Purpose, onAdded: (added: DataFile) => void) {
  const queryClient = useQueryClient();
  const [share, setShare] = useState(0);
  const sending = useMutation({
    mutationFn: (chosen: File) => {
      setShare(0);
      const form = new FormData();
      form.append('purpose', purpose);
      form.append('file', chosen);
      return upload('/v1/files', form, file, setShare);
    },
    onSuccess: async (added) => {
      onAdded(added);
      await queryClient.invalidateQueries({ queryKey: filesQuery(purpose).queryKey });
    },
  });
  return { purpose, sending, share, name: sending.variables?.name ?? '' };
}

export type Uploading = ReturnType<typeof useUpload>;
